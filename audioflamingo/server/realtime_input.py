"""The sound of a live session: bytes as they come -> stretches of speech. Blocking: for worker threads only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.server.realtime_schema import LiveInput
from audioflamingo.transcription.live import LiveEar, SpeechStarted
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window, cut_windows

Found = list[SpeechStarted | Window]


class SoundInput:
    """What has come in and is not committed. With turn detection that is the speech that goes on, else all of it.

    Args:
        config: format and turn detection.
    """

    def __init__(self, config: LiveInput) -> None:
        self._config = config
        self._audio = config.format.new_audio()
        self._ear = self._new_ear(0)
        self._kept: list[np.ndarray] = []
        self._num_kept = 0
        self._position = 0  # samples that came before `_kept`

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz that came in so far."""
        return self._position + self._num_kept if self._ear is None else self._ear.position

    @property
    def kept_s(self) -> float:
        """Seconds that wait for a commit."""
        if self._ear is None:
            return self._num_kept / SAMPLING_RATE
        window = self._ear.open_window()
        return 0.0 if window is None else len(window.waveform) / SAMPLING_RATE

    def duration_s(self, data: bytes) -> float:
        """Seconds that so many bytes last."""
        return self._audio.duration_s(len(data))

    def put(self, data: bytes) -> Found:
        """Takes bytes; what has begun and what has ended.

        Raises:
            AudioError: half a sample.
        """
        return self._take(self._audio.put(data))

    def commit(self) -> Found:
        """Ends what has come in: its windows. They are none where nobody spoke."""
        found = self._take(self._audio.end())
        if self._ear is not None:
            return [*found, *self._ear.flush()]
        kept, start = self._kept, self._position
        self.clear()
        windows = cut_windows(kept, TranscriptionOptions())
        return [replace(window, start=window.start + start) for window in windows]

    def clear(self) -> None:
        """Forgets what has come in."""
        self._take(self._audio.end())
        self._position = self.num_samples
        self._kept, self._num_kept = [], 0
        self._ear = self._new_ear(self._position)

    def configure(self, config: LiveInput) -> Found:
        """Changes format and turn detection; speech that goes on under the old rules ends here."""
        if config.format == self._config.format and config.turn_detection == self._config.turn_detection:
            self._config = config
            return []
        found = self._take(self._audio.end())
        if self._ear is not None:
            found += self._ear.flush()
        kept, start = self._kept, self._position if self._ear is None else self._ear.position
        self._config, self._audio = config, config.format.new_audio()
        self._kept, self._num_kept, self._position = [], 0, start
        self._ear = self._new_ear(start)
        for samples in kept:
            found += self._take(samples)
        return found

    def open_window(self) -> Window | None:
        """The speech that goes on, so far."""
        return None if self._ear is None else self._ear.open_window()

    def _take(self, samples: np.ndarray) -> Found:
        if self._ear is not None:
            return list(self._ear.put(samples))
        self._kept.append(samples)
        self._num_kept += len(samples)
        return []

    def _new_ear(self, start: int) -> LiveEar | None:
        turns = self._config.turn_detection
        return None if turns is None else LiveEar(turns.options, start)
