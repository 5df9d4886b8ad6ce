"""Cuts a stream of audio at silences into windows that the model takes, in bounded memory.

A window is a stretch of speech with a little of the pause on either side, or several with the pauses between them
(`max_pause_ms`). Speech that goes on for longer than
a window is cut where it is quietest. Times are counted in samples, so they are exact however long the audio
is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.audio.reading import channel_names
from audioflamingo.audio.vad import VAD_FRAME, SoundDetector, SpeechDetector, frame_levels, frames_of
from audioflamingo.errors import AudioError
from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions

SMOOTHING_FRAMES = 7  # a cut needs 0.2 s of quiet, not one quiet frame
MIN_WINDOW_SAMPLES = SAMPLING_RATE // 10  # shorter windows are filled with silence: the model needs 20 ms


def between(blocks: Iterable[np.ndarray], start_s: float | None, end_s: float | None) -> Iterator[np.ndarray]:
    """The part of blocks (channels, n) between two times; reads no further than its end.

    Raises:
        AudioError: the recording ends before the part begins.
    """
    first = round((start_s or 0.0) * SAMPLING_RATE)
    end = None if end_s is None else round(end_s * SAMPLING_RATE)
    position = 0
    for block in blocks:
        piece = block[:, max(0, first - position) : None if end is None else end - position]
        position += block.shape[1]
        if piece.shape[1]:
            yield piece
        if end is not None and position >= end:
            return
    if first and position <= first:
        raise AudioError(
            f"the recording lasts {position / SAMPLING_RATE:.2f} s, and was to begin at {start_s:g} s."
        )


Detector = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Window:
    """A stretch of audio for the model.

    Attributes:
        start: its first sample in the source, at 16 kHz.
        waveform: float32 (samples,).
        is_cut: whether speech goes on behind it.
        speech_probability: mean over its frames; None if nobody looked for speech.
        channel: name of the channel that it is of; None for a mixture.
    """

    start: int
    waveform: np.ndarray
    is_cut: bool = False
    speech_probability: float | None = None
    channel: str | None = None

    @property
    def start_s(self) -> float:
        """Where it starts, in seconds."""
        return self.start / SAMPLING_RATE

    @property
    def end_s(self) -> float:
        """Where it ends, in seconds."""
        return (self.start + len(self.waveform)) / SAMPLING_RATE

    @property
    def model_input(self) -> np.ndarray:
        """The waveform, filled with silence if it is too short for the model."""
        return np.pad(self.waveform, (0, max(0, MIN_WINDOW_SAMPLES - len(self.waveform))))

    def halves(self) -> tuple[Window, Window]:
        """The window cut in two at the quietest place of its middle third."""
        levels = frame_levels(self.waveform)
        third = len(levels) // 3
        at = (third + quietest(levels[third : 2 * third])) * VAD_FRAME if third else len(self.waveform) // 2
        first = replace(self, waveform=self.waveform[:at], is_cut=True)
        return first, replace(self, start=self.start + at, waveform=self.waveform[at:])


def quietest(scores: np.ndarray) -> int:
    """Index of the lowest of the smoothed `scores` (n,), the last one of several."""
    kernel = np.ones(min(SMOOTHING_FRAMES, len(scores)))
    counts = np.convolve(np.ones(len(scores)), kernel, mode="same")
    smooth = np.convolve(scores, kernel, mode="same") / counts
    return len(scores) - 1 - int(np.argmin(smooth[::-1]))


def cut_windows(
    blocks: Iterable[np.ndarray],
    options: TranscriptionOptions,
    on_samples: Callable[[int], None] | None = None,
) -> Iterator[Window]:
    """Finds speech in a stream of 16 kHz samples and cuts it into windows, each channel for itself.

    Args:
        blocks: float32 (samples,) or (channels, samples), of any lengths.
        options: whether and how speech is found.
        on_samples: called with the number of samples of a channel that were looked at so far.

    Yields:
        Windows in the order of their starts, without overlap within a channel, each at most `options.vad.max_window_s`
        long.
    """
    ears: list[_Ear] = []
    ready: list[Window] = []
    for block in frames_of(np.atleast_2d(block) for block in blocks):
        ears = ears or [_Ear(options, name) for name in channel_names(len(block))]
        for ear, samples in zip(ears, block, strict=True):
            ready += ear.put(samples)
        # No later window starts before this.
        first_open = min(ear.cutter.first_open for ear in ears)
        ready.sort(key=lambda window: window.start)
        while ready and (len(ears) == 1 or ready[0].start < first_open):
            yield ready.pop(0)
        if on_samples is not None:
            on_samples(ears[0].cutter.num_samples)
    yield from sorted(
        [*ready, *(window for ear in ears for window in ear.end())], key=lambda window: window.start
    )


def part_windows(
    blocks: Iterable[np.ndarray],
    options: TranscriptionOptions,
    on_samples: Callable[[int], None] | None = None,
) -> Iterator[Window]:
    """The same for the part that the options name, with times from the start of the whole.

    Raises:
        AudioError: the recording ends before the part begins.
    """
    first = round((options.start_s or 0.0) * SAMPLING_RATE)
    for window in cut_windows(between(blocks, options.start_s, options.end_s), options, on_samples):
        yield replace(window, start=window.start + first)


class _Ear:
    """Finds the speech of one channel."""

    def __init__(self, options: TranscriptionOptions, channel: str | None) -> None:
        self._detector: Detector = SpeechDetector() if options.use_vad else SoundDetector()
        self._channel = channel
        self.cutter = WindowCutter(options.vad, cut_by_level=not options.use_vad)

    def put(self, samples: np.ndarray) -> Iterator[Window]:
        return self._named(self.cutter.put(samples, self._detector(samples)))

    def end(self) -> Iterator[Window]:
        return self._named(self.cutter.end())

    def _named(self, windows: Iterator[Window]) -> Iterator[Window]:
        return (replace(window, channel=self._channel) for window in windows)


class WindowCutter:
    """Takes scored blocks, gives windows. Holds at most one window and one block of samples.

    Args:
        options: thresholds and lengths.
        cut_by_level: keep sounds of any length, and cut them by loudness, not by the probability of speech.

    Attributes:
        num_samples: samples that were put in so far.
    """

    def __init__(self, options: VadOptions, cut_by_level: bool = False) -> None:
        self._options = options
        self._cut_by_level = cut_by_level
        self._pad = round(options.pad_ms * SAMPLING_RATE / 1000)
        self._min_silence = max(1, round(options.min_silence_ms * SAMPLING_RATE / 1000))
        max_pause = round(options.max_pause_ms * SAMPLING_RATE / 1000)
        self._max_pause = max(self._min_silence, max_pause)
        self._min_speech = 0 if cut_by_level else round(options.min_speech_ms * SAMPLING_RATE / 1000)
        self._max_speech = int(options.max_window_s * SAMPLING_RATE) - 2 * self._pad - VAD_FRAME
        self._search_frames = max(1, int(options.cut_search_s * SAMPLING_RATE) // VAD_FRAME)
        self.num_samples = 0
        self._samples = np.zeros(0, np.float32)
        self._scores = np.zeros(0, np.float32)
        self._offset = 0  # the first sample in `_samples`; a multiple of VAD_FRAME, as all of the following
        self._start: int | None = None  # where the present speech began
        self._silence: int | None = None  # where a pause in it began
        self._pauses: list[tuple[int, int]] = []  # within the present speech that could have ended it
        self._last_end = 0  # where the speech before ended

    @property
    def first_open(self) -> int:
        """The first sample that a window may start at that is still to come."""
        return max(0, (self.num_samples if self._start is None else self._start) - self._pad)

    def put(self, block: np.ndarray, probabilities: np.ndarray) -> Iterator[Window]:
        """Takes samples, of whole frames except at the end of the audio, and their speech probabilities."""
        first = self.num_samples
        self._samples = np.concatenate([self._samples, block])
        levels = frame_levels(block)
        scores = levels if self._cut_by_level else probabilities + 1e-3 * np.minimum(levels, 1)
        self._scores = np.concatenate([self._scores, scores])
        self.num_samples += len(block)
        for index, probability in enumerate(probabilities.tolist()):
            yield from self._put_frame(first + index * VAD_FRAME, probability)
        self._forget()

    def end(self) -> Iterator[Window]:
        """Gives the window that is still open at the end of the audio."""
        if self._start is not None:
            yield from self._close(self._open_end)

    def open_window(self) -> Window | None:
        """The speech that goes on, so far, once it is long enough to become a window; None where nobody speaks."""
        if self._start is None or not self._is_kept(self._start, self._open_end):
            return None
        return self._window(self._start, self._open_end)

    @property
    def _open_end(self) -> int:
        """Where the present speech would end if nothing followed."""
        return self.num_samples if self._silence is None else self._silence

    def _is_kept(self, start: int, end: int) -> bool:
        """Whether a stretch is long enough for speech; the rest of speech that was cut always is."""
        return end - start >= (1 if start == self._last_end else max(1, self._min_speech))

    def _put_frame(self, at: int, probability: float) -> Iterator[Window]:
        """Takes the frame that starts at sample `at`."""
        end = at + VAD_FRAME
        if probability >= self._options.threshold:
            if self._silence is not None and at - self._silence >= self._min_silence:
                self._pauses.append((self._silence, at))
            self._silence = None
            if self._start is None:
                self._start = at
        elif self._start is not None and probability < self._options.end_threshold:
            self._silence = at if self._silence is None else self._silence
            if end - self._silence >= self._max_pause:
                yield from self._close(self._silence)
        if self._start is not None and end - self._start >= self._max_speech:
            yield from self._cut(end)

    def _cut(self, end: int) -> Iterator[Window]:
        """Cuts speech that has become too long: in its last pause, or else at its quietest place before `end`."""
        assert self._start is not None
        if self._silence is not None and end - self._silence >= self._min_silence:
            yield from self._close(self._silence)
            return
        if self._pauses:
            (pause, following), silence = self._pauses[-1], self._silence
            yield from self._close(pause)
            self._start, self._silence = following, silence
            return
        last = (end - self._offset) // VAD_FRAME
        first = max((self._start - self._offset) // VAD_FRAME + 1, last - self._search_frames)
        at = self._offset + (first + quietest(self._scores[first:last])) * VAD_FRAME
        yield self._window(self._start, at, is_cut=self._silence is None or at < self._silence, pad_end=False)
        self._start = self._last_end = at

    def _close(self, end: int) -> Iterator[Window]:
        """Ends the present speech at sample `end`."""
        start, self._start, self._silence = self._start, None, None
        self._pauses = []
        assert start is not None
        if self._is_kept(start, end):
            yield self._window(start, end)
            self._last_end = end

    def _window(self, start: int, end: int, is_cut: bool = False, pad_end: bool = True) -> Window:
        before = min(self._pad, (start - self._last_end) // 2 if self._last_end else start)
        after = min(self._pad, self._min_silence // 2) if pad_end else 0
        start, end = start - before, min(end + after, self.num_samples)
        samples = self._samples[start - self._offset : end - self._offset].copy()
        probability = None
        if not self._cut_by_level:
            frames = self._scores[(start - self._offset) // VAD_FRAME : -(-(end - self._offset) // VAD_FRAME)]
            probability = min(1.0, float(frames.mean()))  # the level in the scores is at most 0.001
        return Window(start, samples, is_cut, probability)

    def _forget(self) -> None:
        """Drops the samples that no later window can hold."""
        needed = (self.num_samples if self._start is None else self._start) - self._pad
        drop = max(0, needed - self._offset) // VAD_FRAME
        self._samples, self._scores = self._samples[drop * VAD_FRAME :], self._scores[drop:]
        self._offset += drop * VAD_FRAME
