"""Long transcription: find speech, run its windows in batches, guard against loops.

Left out on purpose: time stamps within a segment, which the model was not trained to give, and context
carried from one segment to the next, which is what lets loops spread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from audioflamingo.audio.loading import SAMPLING_RATE, stream_audio
from audioflamingo.engine.loops import find_loop
from audioflamingo.errors import AudioFlamingoError, AudioFlamingoWarning, unknown_arguments
from audioflamingo.kernels.host import to_host
from audioflamingo.transcription.mending import Answer, Ask, mend
from audioflamingo.transcription.options import TranscriptionOptions
from audioflamingo.transcription.segments import Finished, Segment
from audioflamingo.transcription.windows import Window, cut_windows

LOOP_CHECK_STEPS = 16  # tokens between two looks for loops while an answer grows
OnProgress = Callable[[int, float], None]


def transcribe(
    model: Any,
    processor: Any,
    source: Any,
    *,
    sampling_rate: float | None = None,
    options: TranscriptionOptions | None = None,
    on_progress: Callable[[float], None] | None = None,
    **changes: Any,
) -> Iterator[Segment]:
    """Transcribes audio of any length, segment by segment, in memory that does not grow with it.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration`.
        processor: its `AudioFlamingo3Processor`.
        source: a path, URL, bytes, file object, array or tensor; see `load_audio`.
        sampling_rate: Hz of an array or tensor.
        options: batch size, prompt, how speech is found.
        on_progress: called with the seconds of audio that have been searched for speech.
        **changes: fields of `TranscriptionOptions` that differ from `options`.

    Yields:
        Segments in order; none where nobody speaks.

    Raises:
        AudioError: the source cannot be read. If it breaks off, what came before is yielded first.
        ArgumentError: an option that does not exist, or a value that is not allowed.
    """
    options = change_options("transcribe()", options, changes)
    progress = None if on_progress is None else lambda _, seconds: on_progress(seconds)
    return _one(model, processor, source, sampling_rate, options, progress)


def _one(
    model: Any,
    processor: Any,
    source: Any,
    sampling_rate: float | None,
    options: TranscriptionOptions,
    on_progress: OnProgress | None,
) -> Iterator[Segment]:
    events = _run(model, processor, [source], sampling_rate, options, on_progress)
    for _, event in events:
        if isinstance(event, Segment):
            yield event
        elif event.error is not None:
            raise event.error


def transcribe_all(
    model: Any,
    processor: Any,
    sources: Iterable[Any],
    *,
    options: TranscriptionOptions | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> Iterator[tuple[int, Segment | Finished]]:
    """Transcribes many sources; windows of several share a batch, so short files run as fast as long ones.

    Args:
        model, processor, options, **changes: see `transcribe`.
        sources: what `transcribe` takes; opened one after the other.
        on_progress: called with the index of a source and the seconds of it that have been searched.

    Yields:
        `(index of the source, Segment)` in order, and `(index, Finished)` behind the last segment of each. A
        source that fails has its error there, and the others go on.

    Raises:
        ArgumentError: an option that does not exist, or a value that is not allowed.
    """
    options = change_options("transcribe_all()", options, changes)
    return _run(model, processor, sources, None, options, on_progress)


def change_options(
    where: str, options: TranscriptionOptions | None, changes: dict[str, Any]
) -> TranscriptionOptions:
    """The options with some fields changed."""
    names = [f.name for f in dataclasses.fields(TranscriptionOptions)]
    if unknown := [name for name in changes if name not in names]:
        raise unknown_arguments(where, unknown, ("sampling_rate", "options", "on_progress", *names))
    return dataclasses.replace(options or TranscriptionOptions(), **changes)


def _run(
    model: Any,
    processor: Any,
    sources: Iterable[Any],
    sampling_rate: float | None,
    options: TranscriptionOptions,
    on_progress: OnProgress | None,
) -> Iterator[tuple[int, Segment | Finished]]:
    transcriber = WindowTranscriber(model, processor, options)
    waiting: list[tuple[int, Window | Finished]] = []
    num_windows = 0
    for index, source in enumerate(sources):
        for item in _read(index, source, sampling_rate, options, on_progress):
            waiting.append((index, item))
            num_windows += isinstance(item, Window)
            if num_windows == options.batch_size or (num_windows == 0 and isinstance(item, Finished)):
                yield from _flush(transcriber, waiting)
                waiting, num_windows = [], 0
    yield from _flush(transcriber, waiting)


def _read(
    index: int,
    source: Any,
    sampling_rate: float | None,
    options: TranscriptionOptions,
    on_progress: OnProgress | None,
) -> Iterator[Window | Finished]:
    """The windows of one source, then its end."""
    num_samples = 0

    def count(samples: int) -> None:
        nonlocal num_samples
        num_samples = samples
        if on_progress is not None:
            on_progress(index, samples / SAMPLING_RATE)

    error: Exception | None = None
    try:
        yield from cut_windows(stream_audio(source, sampling_rate=sampling_rate), options, count)
    except (AudioFlamingoError, OSError) as caught:
        error = caught
    yield Finished(num_samples / SAMPLING_RATE, error)


def _flush(
    transcriber: WindowTranscriber, waiting: list[tuple[int, Window | Finished]]
) -> Iterator[tuple[int, Segment | Finished]]:
    """Transcribes the waiting windows together. A source whose window fails fails alone."""
    results = iter(transcriber.run([item for _, item in waiting if isinstance(item, Window)]))
    failed: dict[int, AudioFlamingoError] = transcriber.failed
    for index, item in waiting:
        if isinstance(item, Finished):
            error = failed.pop(index, None) or item.error
            yield index, dataclasses.replace(item, error=error)
            continue
        result = next(results)
        if isinstance(result, AudioFlamingoError):
            failed.setdefault(index, result)
            continue
        for segment in result:
            yield index, segment


class WindowTranscriber:
    """Runs windows through the model and mends what goes wrong.

    Attributes:
        failed: the first error of each source, until its end is reported.
    """

    def __init__(self, model: Any, processor: Any, options: TranscriptionOptions) -> None:
        self._model = model
        self._processor = processor
        self._options = options
        self._batch_size = options.batch_size
        self.failed: dict[int, AudioFlamingoError] = {}

    def run(self, windows: list[Window]) -> list[list[Segment] | AudioFlamingoError]:
        """The segments of each window, or the error that it alone ends in."""
        try:
            return list(self._segments(windows))
        except torch.OutOfMemoryError as error:
            if self._batch_size == 1:
                raise
            self._batch_size = max(1, self._batch_size // 2)
            warnings.warn(
                f"the device ran out of memory with {len(windows)} windows together; going on with "
                f"{self._batch_size}. Pass a smaller batch_size. ({str(error).splitlines()[0]})",
                AudioFlamingoWarning,
                stacklevel=2,
            )
            return self.run(windows)
        except AudioFlamingoError as error:
            if len(windows) == 1:
                return [error]
            return [result for window in windows for result in self.run([window])]

    def _segments(self, windows: list[Window]) -> list[list[Segment]]:
        """Answers all windows, then, as long as some are to be mended, what those ask for, together."""
        answers = self._answer(windows)
        mending = [
            mend(window, answer, self._options, self._processor)
            for window, answer in zip(windows, answers, strict=True)
        ]
        segments: list[list[Segment]] = [[] for _ in windows]
        replies: dict[int, list[Answer] | None] = dict.fromkeys(range(len(windows)))
        while replies:
            asks: dict[int, Ask] = {}
            for index, reply in replies.items():
                try:
                    asks[index] = mending[index].send(reply)
                except StopIteration as done:
                    segments[index] = done.value
            replies = self._answer_asks(asks)
        return segments

    def _answer_asks(self, asks: dict[int, Ask]) -> dict[int, list[Answer] | None]:
        """Runs windows with the same rules together."""
        replies: dict[int, list[Answer] | None] = {}
        for ngram_size in sorted({ask.no_repeat_ngram_size for ask in asks.values()}):
            alike = {i: ask for i, ask in asks.items() if ask.no_repeat_ngram_size == ngram_size}
            rules = {"no_repeat_ngram_size": ngram_size} if ngram_size else {}
            answers = iter(
                self._answer([window for ask in alike.values() for window in ask.windows], **rules)
            )
            replies |= {i: [next(answers) for _ in ask.windows] for i, ask in alike.items()}
        return replies

    def _answer(self, windows: list[Window], **rules: Any) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(windows), self._batch_size):
            answers += self._answer_batch(windows[start : start + self._batch_size], rules)
        return answers

    def _answer_batch(self, windows: list[Window], rules: dict[str, Any]) -> list[Answer]:
        inputs = self._processor.apply_transcription_request(
            audio=[window.model_input for window in windows], prompt=self._options.prompt
        ).to(self._model.device, dtype=self._model.dtype)
        num_beams = self._options.num_beams or self._model.generation_config.num_beams
        options = {
            **inputs,
            "max_new_tokens": self._options.max_new_tokens,
            "do_sample": False,
            "num_beams": num_beams,
            "output_logprobs": True,
            **rules,
        }
        answers = self._search(options) if num_beams > 1 else self._follow(options, len(windows))
        for answer in answers:
            answer.find_loop()
        return answers

    def _search(self, options: dict[str, Any]) -> list[Answer]:
        """The best answers of a beam search."""
        output = self._model.generate(**options, return_dict_in_generate=True)
        tokens = to_host(output.sequences[:, options["input_ids"].shape[1] :])
        logprobs = to_host(output.logprobs)
        return [
            Answer(tokens[row][:length], logprobs[row][:length], reason)
            for row, (length, reason) in enumerate(
                zip(output.num_new_tokens, output.finish_reasons, strict=True)
            )
        ]

    def _follow(self, options: dict[str, Any], num_rows: int) -> list[Answer]:
        """Greedy answers. Stops early once every answer that is not finished is in a loop."""
        answers = [Answer() for _ in range(num_rows)]
        with contextlib.closing(self._model.stream(**options)) as steps:
            for count, step in enumerate(steps, start=1):
                logprobs = to_host(step.logprobs)
                for row, answer in enumerate(answers):
                    if step.is_new[row]:
                        answer.tokens.append(int(step.token_ids[row]))
                        answer.logprobs.append(logprobs[row])
                        answer.finish_reason = step.finish_reasons[row] or "length"
                if count % LOOP_CHECK_STEPS == 0:
                    running = [
                        a for a, reason in zip(answers, step.finish_reasons, strict=True) if not reason
                    ]
                    if running and all(find_loop(answer.tokens) is not None for answer in running):
                        break
        return answers
