"""A recording as the model sees it: windows, frames, audio tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from audioflamingo.audio.decoding import read_audio_info
from audioflamingo.audio.loading import (
    HOP_LENGTH,
    MAX_AUDIO_S,
    N_SAMPLES,
    SAMPLING_RATE,
    check_waveform,
    num_audio_tokens,
    split_windows,
)
from audioflamingo.audio.vad import VAD_FRAME, SpeechDetector, frames_of
from audioflamingo.transcription.transcription_options import VadOptions


@dataclass(frozen=True)
class WindowView:
    """One window of the encoder: where it is, and how much of it is there."""

    start_s: float
    end_s: float
    num_frames: int
    num_audio_tokens: int
    speech_s: float


@dataclass(frozen=True)
class RecordingView:
    """A recording as the model sees it.

    Attributes:
        container, codec, sampling_rate_hz, num_channels: of the file; None where it does not say.
        duration_s: seconds that were decoded.
        used_s: seconds that one prompt takes; the rest is only reached by `af3 transcribe`.
        peak, rms: of the mono waveform, 1 is full scale.
        windows: in order.
    """

    name: str
    container: str | None
    codec: str | None
    sampling_rate_hz: int | None
    num_channels: int | None
    duration_s: float
    used_s: float
    peak: float
    rms: float
    windows: list[WindowView]

    @property
    def num_audio_tokens(self) -> int:
        """Positions of the prompt that hold audio."""
        return sum(window.num_audio_tokens for window in self.windows)


def look_at(name: str, source: Any, waveform: np.ndarray, track: int | None = None) -> RecordingView:
    """Measures a recording.

    Raises:
        AudioError: it is too short for one audio token.
    """
    check_waveform(waveform, repr(name))
    info = read_audio_info(source, track)
    used = waveform[: MAX_AUDIO_S * SAMPLING_RATE]
    speech = _speech(used)
    windows = []
    for index, window in enumerate(split_windows(used)):
        start = index * N_SAMPLES
        num_frames = math.ceil(len(window) / HOP_LENGTH)
        frames = speech[start // VAD_FRAME : (start + len(window)) // VAD_FRAME + 1]
        windows.append(
            WindowView(
                start / SAMPLING_RATE,
                (start + len(window)) / SAMPLING_RATE,
                num_frames,
                num_audio_tokens(num_frames),
                round(
                    min(len(window), int((frames >= VadOptions.threshold).sum()) * VAD_FRAME) / SAMPLING_RATE,
                    2,
                ),
            )
        )
    return RecordingView(
        name=name,
        container=None if info is None else info.container,
        codec=None if info is None else info.codec,
        sampling_rate_hz=None if info is None else info.sampling_rate,
        num_channels=None if info is None else info.num_channels,
        duration_s=len(waveform) / SAMPLING_RATE,
        used_s=len(used) / SAMPLING_RATE,
        peak=float(np.abs(waveform).max()),
        rms=float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))),
        windows=windows,
    )


def _speech(waveform: np.ndarray) -> np.ndarray:
    """Probability of speech in each 32 ms."""
    detector = SpeechDetector()
    return np.concatenate([detector(block) for block in frames_of([waveform])])
