"""Speech while it is spoken: samples as they come -> where speech begins, what there is of it, and where it ends.

Windows are found by the same rules as those of a recording (`windows.WindowCutter`), a few frames at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from audioflamingo.audio.vad import VAD_FRAME, SpeechDetector
from audioflamingo.transcription.transcription_options import VadOptions
from audioflamingo.transcription.windows import Window, WindowCutter

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
            frame = np.pad(self._rest, (0, VAD_FRAME - len(self._rest)))
            yield from self._tell(self._cutter.put(frame, self._detector(frame)))
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
