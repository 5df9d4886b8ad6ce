"""Speech while it is spoken: samples as they come -> where speech begins, what there is of it, and where it ends.

Windows are found by the same rules as those of a recording (`windows.WindowCutter`), a few frames at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from audioflamingo.audio.vad import VAD_FRAME, SpeechDetector
from audioflamingo.engine.generate import evaluation_mode
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription.driver import WindowTranscriber
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcriber import change_options
from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions
from audioflamingo.transcription.windows import Window, WindowCutter
from audioflamingo.transcription.writers import joined_text

BLOCK = 8 * VAD_FRAME  # 0.26 s: samples that are searched together


@dataclass(frozen=True)
class SpeechStarted:
    """Somebody began to speak.

    Attributes:
        start: the first sample of the window that will come.
    """

    start: int


class LiveEar:
    """Finds speech in a stream that is still going on.

    Args:
        options: thresholds and lengths.
        start: the stream's first sample, where it begins in the middle of something.
    """

    def __init__(self, options: VadOptions, start: int = 0) -> None:
        self._options = options
        self._detector = SpeechDetector()
        self._base = start  # the first sample that the present cutter has seen
        self._cutter = WindowCutter(options)
        self._rest = np.zeros(0, np.float32)  # less than a frame
        self._is_announced = False

    @property
    def position(self) -> int:
        """Samples that were put in so far."""
        return self._base + self._cutter.num_samples + len(self._rest)

    def put(self, samples: np.ndarray) -> Iterator[SpeechStarted | Window]:
        """Takes samples (n,) at 16 kHz; what has begun and what has ended, in order."""
        samples = np.concatenate([self._rest, samples])
        num_whole = len(samples) // VAD_FRAME * VAD_FRAME
        self._rest = samples[num_whole:]
        for first in range(0, num_whole, BLOCK):
            block = samples[first : min(first + BLOCK, num_whole)]
            yield from self._tell(self._cutter.put(block, self._detector(block)))

    def flush(self) -> Iterator[SpeechStarted | Window]:
        """Ends the speech that goes on; what follows is searched anew."""
        position = self.position
        if len(self._rest):
            yield from self._tell(self._cutter.put(self._rest, self._detector(self._rest)))
        yield from self._tell(self._cutter.end())
        self._base, self._cutter = position, WindowCutter(self._options)
        self._rest = self._rest[:0]
        self._is_announced = False

    def open_window(self) -> Window | None:
        """The speech that goes on, so far; None where nobody speaks."""
        window = self._cutter.open_window()
        return None if window is None else self._placed(window)

    def _tell(self, windows: Iterator[Window]) -> Iterator[SpeechStarted | Window]:
        for window in windows:
            if not self._is_announced:
                yield SpeechStarted(self._base + window.start)
            self._is_announced = False
            yield self._placed(window)
        if not self._is_announced and (begun := self.open_window()) is not None:
            self._is_announced = True
            yield SpeechStarted(begun.start)

    def _placed(self, window: Window) -> Window:
        return replace(window, start=self._base + window.start)


class Agreement:
    """The words of growing speech that two hearings in a row agree on: they are shown before it ends.

    What was heard last may be half a word, and is not shown until it is heard again with more behind it.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self._before: list[str] = []

    def add(self, text: str) -> str:
        """Takes what was heard; returns what more is agreed on, with the space before it, or nothing."""
        words, before = text.split(), self._before
        self._before = words
        count = 0
        while count < min(len(words), len(before)) and words[count] == before[count]:
            count += 1
        return self._grow(words[:count])

    def end(self, text: str) -> str:
        """Takes what was heard in the end; returns what is still to be said, if it continues what was said."""
        return self._grow(text.split())

    def _grow(self, words: list[str]) -> str:
        num_said = len(self.words)
        if words[:num_said] != self.words or len(words) == num_said:
            return ""
        self.words = words
        return (" " if num_said else "") + " ".join(words[num_said:])


@dataclass(frozen=True)
class Draft:
    """What is known of speech that goes on.

    Attributes:
        start_s: when it began.
        text: the words so far that two hearings agree on.
    """

    start_s: float
    text: str


def listen(
    model: AudioFlamingo3WithHead,
    processor: AudioFlamingo3Processor,
    blocks: Iterable[np.ndarray],
    *,
    options: TranscriptionOptions | None = None,
    draft_every_s: float | None = 1.0,
    **changes: Any,
) -> Iterator[Draft | Segment]:
    """Transcribes speech while it is spoken.

    Args:
        model: see `transcribe`.
        processor: likewise.
        blocks: float32 (n,) at 16 kHz, as they come: all that has come in since the last block, so that a slow model
            falls behind by no more than one answer.
        options: see `transcribe`; what it says about files does not apply.
        draft_every_s: seconds of new speech after which it is heard again; None: only once it has ended.
        **changes: fields of `options` that differ.

    Yields:
        A `Draft` whenever more of the present speech is known, then its `Segment`.

    Raises:
        ArgumentError: an option that does not exist, or a value that is not allowed.
        AudioFlamingoError: the model cannot answer.
    """
    options = change_options("listen()", options, changes)
    with evaluation_mode(model):
        listener = _Listener(WindowTranscriber(model, processor, options), options.vad, draft_every_s)
        for samples in blocks:
            yield from listener.put(samples)
        yield from listener.end()


class _Listener:
    """See `listen`."""

    def __init__(
        self, transcriber: WindowTranscriber, options: VadOptions, draft_every_s: float | None
    ) -> None:
        self._ear = LiveEar(options)
        self._transcriber = transcriber
        self._draft_every_s = draft_every_s
        self._agreement = Agreement()
        self._drafted_s = 0.0  # seconds of the present speech that the last draft heard

    def put(self, samples: np.ndarray) -> Iterator[Draft | Segment]:
        yield from self._hear(self._ear.put(samples))
        if self._draft_every_s is None or (window := self._ear.open_window()) is None:
            return
        if window.end_s - window.start_s - self._drafted_s < self._draft_every_s:
            return
        self._drafted_s = window.end_s - window.start_s
        (segments,) = self._transcribe([window])
        is_good = all(segment.finish_reason == "stop" for segment in segments)
        if is_good and self._agreement.add(joined_text(segments)):
            yield Draft(window.start_s, " ".join(self._agreement.words))

    def end(self) -> Iterator[Draft | Segment]:
        yield from self._hear(self._ear.flush())

    def _hear(self, found: Iterator[SpeechStarted | Window]) -> Iterator[Segment]:
        windows = [news for news in found if isinstance(news, Window)]
        if windows:
            self._agreement, self._drafted_s = Agreement(), 0.0
        for segments in self._transcribe(windows):
            yield from segments

    def _transcribe(self, windows: list[Window]) -> Iterator[list[Segment]]:
        """The segments of each window."""
        jobs = [self._transcriber.start(window) for window in windows]
        for job in jobs:
            while not job.is_done:
                self._transcriber.step()
            if job.error is not None:
                raise job.error
            yield job.segments or []
