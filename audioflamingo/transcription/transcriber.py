"""Long transcription: find speech, run its windows through the engine, guard against loops.

Left out on purpose: time stamps within a segment, which the model was not trained to give, and context
carried from one segment to the next, which is what lets loops spread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from audioflamingo.audio.loading import SAMPLING_RATE, stream_channels
from audioflamingo.engine.generate import evaluation_mode
from audioflamingo.errors import AudioFlamingoError, unknown_arguments
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription.driver import InOrder, WindowJob, WindowTranscriber
from audioflamingo.transcription.segments import Finished, Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window, part_windows

OnProgress = Callable[[int, float], None]


def transcribe(
    model: AudioFlamingo3WithHead,
    processor: AudioFlamingo3Processor,
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
        options: batch size, prompt, adapter, how speech is found.
        on_progress: called with the seconds of audio that have been searched for speech.
        **changes: fields of `TranscriptionOptions` that differ from `options`.

    Yields:
        Segments in the order of their starts; none where nobody speaks. With `channel="each"` each has the name of its
        channel.

    Raises:
        AudioError: the source cannot be read. If it breaks off, what came before is yielded first.
        ArgumentError: an option that does not exist, or a value that is not allowed.
    """
    options = change_options("transcribe()", options, changes)
    progress = None if on_progress is None else lambda _, seconds: on_progress(seconds)
    return _one(model, processor, source, sampling_rate, options, progress)


def _one(
    model: AudioFlamingo3WithHead,
    processor: AudioFlamingo3Processor,
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
    model: AudioFlamingo3WithHead,
    processor: AudioFlamingo3Processor,
    sources: Iterable[Any],
    *,
    options: TranscriptionOptions | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> Iterator[tuple[int, Segment | Finished]]:
    """Transcribes many sources; windows of several run together, so short files run as fast as long ones.

    Args:
        model: see `transcribe`.
        processor: likewise.
        sources: what `transcribe` takes; opened one after the other.
        options: see `transcribe`.
        on_progress: called with the index of a source and the seconds of it that have been searched.
        **changes: see `transcribe`.

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
    model: AudioFlamingo3WithHead,
    processor: AudioFlamingo3Processor,
    sources: Iterable[Any],
    sampling_rate: float | None,
    options: TranscriptionOptions,
    on_progress: OnProgress | None,
) -> Iterator[tuple[int, Segment | Finished]]:
    """Reads windows as there is room for them, and gives what is done in the order in which it was read."""
    with evaluation_mode(model):
        transcriber = WindowTranscriber(model, processor, options)
        items = _read_all(sources, sampling_rate, options, on_progress)
        failed: dict[int, Exception] = {}  # the first error of each source, until its end is reported
        line: InOrder[tuple[int, WindowJob | Finished]] = InOrder(lambda entry: entry[1].is_done)
        while line.has_work:
            while line.may_read(transcriber.has_room):
                index, item = next(items, (-1, None))
                if isinstance(item, Window):
                    line.add((index, transcriber.start(item)))
                else:
                    line.add(None if item is None else (index, item))
            if not line.is_first_done:
                transcriber.step()
            while line.is_first_done:
                yield from _report(*line.pop(), failed)


def _report(
    index: int, item: WindowJob | Finished, failed: dict[int, Exception]
) -> Iterator[tuple[int, Segment | Finished]]:
    """The segments of a window, or the end of a source with the first error of its windows."""
    if isinstance(item, Finished):
        yield index, dataclasses.replace(item, error=failed.pop(index, None) or item.error)
    elif item.error is not None:
        failed.setdefault(index, item.error)
    else:
        for segment in item.segments or ():
            yield index, segment


def _read_all(
    sources: Iterable[Any],
    sampling_rate: float | None,
    options: TranscriptionOptions,
    on_progress: OnProgress | None,
) -> Iterator[tuple[int, Window | Finished]]:
    """The windows of all sources, each followed by its end, opened one after the other."""
    for index, source in enumerate(sources):
        for item in _read(index, source, sampling_rate, options, on_progress):
            yield index, item


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
        blocks = stream_channels(source, sampling_rate=sampling_rate, reading=options.reading)
        yield from part_windows(blocks, options, count)
    except (AudioFlamingoError, OSError) as caught:
        error = caught
    yield Finished(num_samples / SAMPLING_RATE, error)
