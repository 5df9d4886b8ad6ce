"""Frames where their time stamps say: a late start, gaps and packets that were left out become silence.

So the place of a sample in the stream is its time in the container, however long the file is. Time stamps of live
recordings tremble, so one frame's stamp proves nothing: a gap is one that all frames of the next quarter of a second
agree on. Where a recorder's clock ran slower than its time stamps' (less time than samples), the quietest
frames lose some samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from audioflamingo.errors import warn

TOLERANCE_S = 0.05  # by which a sample may be off its time
LOOK_AHEAD_S = 0.25
REWIND_S = 1.0  # stamps that fall back by more belong to another recording, joined to the first
MAX_GAP_S = 3600.0  # a longer jump is damage, or another clock
LATEST_START_S = 60.0  # a file of which nothing starts earlier was cut out of something longer
SILENCE_SAMPLES = 1 << 15  # in a piece
# FFmpeg's names of the containers whose time stamps are more than a count of the samples before. From 0: those whose
# own clock starts there; the others start anywhere.
CLOCKS_FROM_0 = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "flv", "asf")
CLOCKS = (*CLOCKS_FROM_0, "mpegts", "mpeg", "ogg")
OGG_CODECS = ("opus", "vorbis")  # of others FFmpeg does not know when the first page starts


class Frame(NamedTuple):
    """Decoded samples.

    Attributes:
        time_s: its time stamp; None if it has none.
        rate: Hz.
        samples: (channels, n), in the decoder's number format.
    """

    time_s: float | None
    rate: int
    samples: np.ndarray

    @property
    def duration_s(self) -> float:
        """Seconds of sound."""
        return self.samples.shape[1] / self.rate


def has_clock(container_format: str, codec: str) -> bool:
    """Whether the time stamps of a container (FFmpeg's names) say more than a count of the samples."""
    return container_format in CLOCKS and (container_format != "ogg" or codec in OGG_CODECS)


def zero_of(container_format: str, start_s: float, is_first: bool) -> float:
    """The time stamp that is time 0.

    Args:
        container_format: FFmpeg's name.
        start_s: the earliest time stamp of all tracks.
        is_first: False for a recording that is joined to another one.
    """
    is_from_0 = container_format in CLOCKS_FROM_0 and is_first
    return 0.0 if is_from_0 and abs(start_s) <= LATEST_START_S else start_s


class Timeline:
    """Puts the frames of one track on time.

    Args:
        zero_s: the time stamp that is time 0.
        name: what warnings call the source.

    Attributes:
        position_s: seconds of sound and silence so far.
        silence_s: seconds that were filled with silence.
        dropped_s: seconds of sound that there was no time for.
    """

    def __init__(self, zero_s: float, name: str) -> None:
        self._zero_s = zero_s
        self._zero_before_s: float | None = None  # before the stamps fell back
        self._name = name
        self._waiting: deque[Frame] = deque()
        self._waiting_s = 0.0
        self.position_s = self.silence_s = self.dropped_s = 0.0

    def place(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Yields the frames, with silence where there was none to be had."""
        for frame in frames:
            self._waiting.append(frame)
            self._waiting_s += frame.duration_s
            while self._waiting_s > LOOK_AHEAD_S and len(self._waiting) > 1:
                yield from self._next()
        while self._waiting:
            yield from self._next()

    def _next(self) -> Iterator[Frame]:
        """The first of the frames that wait, behind the silence that it needs."""
        if self._zero_before_s is not None:
            self._return_from_fall(self._zero_before_s)
        late_s = self._lateness()
        if late_s > MAX_GAP_S:
            warn(
                f"{self._name}: its time stamps jump by {late_s:.1f} s at {self.position_s:.1f} s; the times behind "
                "that go on without a gap."
            )
        if late_s > MAX_GAP_S or late_s < -REWIND_S:
            self._zero_before_s = self._zero_s if late_s < 0 else None
            self._zero_s += late_s
        elif late_s > TOLERANCE_S:
            for silence in silent_frames(self._waiting[0], late_s):
                self.silence_s += silence.duration_s
                self.position_s += silence.duration_s
                yield silence
        elif late_s < -TOLERANCE_S:
            self._drop(-late_s)
        frame = self._waiting.popleft()
        duration_s = frame.duration_s
        self._waiting_s -= duration_s
        self.position_s += duration_s
        if frame.samples.shape[1]:
            yield frame

    def _return_from_fall(self, before_s: float) -> None:
        """Goes back to the clock of before where stamps that had fallen back agree with it again."""
        if self._off_by(self._waiting[0], 0.0) < REWIND_S:
            return
        now_s, self._zero_s = self._zero_s, before_s
        if abs(self._off_by(self._waiting[0], 0.0)) > REWIND_S:
            self._zero_s = now_s
        else:
            self._zero_before_s = None

    def _lateness(self) -> float:
        """Seconds by which the first frame is late (early: negative), as far as those behind it agree."""
        first = self._off_by(self._waiting[0], 0.0)
        if abs(first) <= TOLERANCE_S or abs(first) > MAX_GAP_S or first < -REWIND_S:
            return first
        before_s, closest = 0.0, first
        for frame in self._waiting:
            off = self._off_by(frame, before_s)
            before_s += frame.duration_s
            if frame.time_s is None or off < -REWIND_S:
                continue
            closest = max(0.0, min(closest, off)) if first > 0 else min(0.0, max(closest, off))
        return closest

    def _off_by(self, frame: Frame, before_s: float) -> float:
        if frame.time_s is None:
            return 0.0
        return frame.time_s - self._zero_s - self.position_s - before_s

    def _drop(self, duration_s: float) -> None:
        """Shortens the quietest frame that waits."""
        index = int(np.argmin([_power(frame) for frame in self._waiting]))
        frame = self._waiting[index]
        size = min(round(duration_s * frame.rate), frame.samples.shape[1])
        self._waiting[index] = frame._replace(samples=frame.samples[:, size:])
        self._waiting_s -= size / frame.rate
        self.dropped_s += size / frame.rate


def _power(frame: Frame) -> float:
    return float(np.var(frame.samples, dtype=np.float64)) if frame.samples.size else np.inf


def silent_frames(like: Frame, duration_s: float) -> Iterator[Frame]:
    """Silence in the rate, channels and number format of another frame, in pieces."""
    kind = like.samples.dtype
    zero = 1 << (8 * kind.itemsize - 1) if kind.kind == "u" else 0
    num_left = round(duration_s * like.rate)
    while num_left > 0:
        size = min(num_left, SILENCE_SAMPLES)
        num_left -= size
        yield Frame(None, like.rate, np.full((len(like.samples), size), zero, kind))
