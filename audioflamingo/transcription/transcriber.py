"""Long transcription: find speech, run its windows in batches, guard against loops.

Left out on purpose: time stamps within a segment, which the model was not trained to give, and context
carried from one segment to the next, which is what lets loops spread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from audioflamingo.audio.loading import SAMPLING_RATE, stream_audio
from audioflamingo.errors import AudioFlamingoError, AudioFlamingoWarning, unknown_arguments
from audioflamingo.host import to_host
from audioflamingo.transcription.loops import find_loop
from audioflamingo.transcription.options import TranscriptionOptions
from audioflamingo.transcription.segments import Finished, FinishReason, Segment
from audioflamingo.transcription.windows import Window, cut_windows

LOOP_CHECK_STEPS = 16  # tokens between two looks for loops while an answer grows
MAX_SPLITS = 2  # times that a window is halved

OnProgress = Callable[[int, float], None]


@dataclass
class Answer:
    """What the model said about one window, as it came."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    loop_start: int | None = None

    @property
    def is_good(self) -> bool:
        """Whether it came to an end by itself, without a loop."""
        return self.finish_reason == "stop"


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

    def _segments(self, windows: list[Window], depth: int = 0) -> Iterator[list[Segment]]:
        answers = self._answer(windows)
        retried = self._retry(windows, answers)
        for window, answer, again in zip(windows, answers, retried, strict=True):
            duration_s = window.end_s - window.start_s
            if answer.is_good:
                yield [self._segment(window, answer)]
            elif again is not None and again.is_good:
                yield [self._segment(window, again, "retried")]
            elif depth < MAX_SPLITS and duration_s >= self._options.min_split_s:
                parts = [part for half in self._segments(list(window.halves()), depth + 1) for part in half]
                yield [dataclasses.replace(p, flags=tuple(dict.fromkeys((*p.flags, "split")))) for p in parts]
            else:
                yield [self._segment(window, answer)]

    def _retry(self, windows: list[Window], answers: list[Answer]) -> list[Answer | None]:
        """New answers for the windows whose answer got into a loop."""
        retried: list[Answer | None] = [None] * len(windows)
        looped = [i for i, answer in enumerate(answers) if answer.finish_reason == "loop"]
        if looped and self._options.retry_ngram_size:
            again = self._answer(
                [windows[i] for i in looped], no_repeat_ngram_size=self._options.retry_ngram_size
            )
            for i, answer in zip(looped, again, strict=True):
                retried[i] = answer
        return retried

    def _answer(self, windows: list[Window], **rules: Any) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(windows), self._batch_size):
            answers += self._answer_batch(windows[start : start + self._batch_size], rules)
        return answers

    def _answer_batch(self, windows: list[Window], rules: dict[str, Any]) -> list[Answer]:
        """Greedy answers. Stops early once every answer that is not finished is in a loop."""
        inputs = self._processor.apply_transcription_request(
            audio=[window.model_input for window in windows], prompt=self._options.prompt
        ).to(self._model.device, dtype=self._model.dtype)
        answers = [Answer() for _ in windows]
        steps = self._model.stream(
            **inputs,
            max_new_tokens=self._options.max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logprobs=True,
            **rules,
        )
        with contextlib.closing(steps):
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
        for answer in answers:
            answer.loop_start = find_loop(answer.tokens)
            if answer.loop_start is not None:
                answer.finish_reason = "loop"
        return answers

    def _segment(self, window: Window, answer: Answer, *flags: str) -> Segment:
        tokens = answer.tokens[: answer.loop_start]  # a loop is cut where it begins; None cuts nothing
        text = self._processor.decode(tokens, skip_special_tokens=True, strip_prefix=True)
        logprobs = answer.logprobs[: len(tokens)]
        all_flags = [*flags, *(["cut"] if window.is_cut else []), *([] if text else ["no_words"])]
        return Segment(
            start_s=window.start_s,
            end_s=window.end_s,
            text=text,
            tokens=tuple(tokens),
            avg_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
            finish_reason=answer.finish_reason,
            flags=tuple(all_flags),
        )
