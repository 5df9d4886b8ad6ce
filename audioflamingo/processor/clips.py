"""The clips of a batch: from what the caller named to windows of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.audio.loading import (
    HOP_LENGTH,
    check_waveform,
    load_audio,
    num_audio_tokens,
    split_windows,
)
from audioflamingo.processor.options import AudioOptions


@dataclass(frozen=True, eq=False)
class Clip:
    """One audio of a conversation.

    Attributes:
        source: whatever `load_audio` takes.
        sampling_rate: Hz of an in-memory array, where one is stated for this clip.
        key: the key under which a message gave the source.
    """

    source: Any
    sampling_rate: float | None = None
    key: str = "audio"


def load_windows(
    clips: list[Clip],
    feature_extractor: AudioFlamingo3FeatureExtractor,
    max_audio_len: float,
    options: AudioOptions,
) -> list[list[np.ndarray]]:
    """Loads clips, each source once, and cuts them.

    Returns:
        For each clip its windows, float32 (samples,).

    Raises:
        AudioError: a clip that cannot be read, is too short for one audio token, or too long where that is
            refused.
    """
    loaded: dict[Any, np.ndarray] = {}
    windows = []
    for index, clip in enumerate(clips):
        rate = clip.sampling_rate
        if rate is None and isinstance(clip.source, np.ndarray | Tensor):
            rate = options.sampling_rate
        key = (clip.source if isinstance(clip.source, str) else id(clip.source), rate)
        if key not in loaded:
            loaded[key] = load_audio(
                clip.source, sampling_rate=rate, target_rate=feature_extractor.sampling_rate
            )
        name = f"clip {index}"
        check_waveform(loaded[key], name)
        windows.append(
            split_windows(
                loaded[key],
                on_long=options.on_long,
                max_windows=int(max_audio_len // feature_extractor.chunk_length),
                window_samples=feature_extractor.num_samples,
                name=name,
            )
        )
    return windows


def count_audio_tokens(windows: list[np.ndarray]) -> int:
    """Audio tokens of a clip: the sum over its windows."""
    return sum(num_audio_tokens(math.ceil(len(window) / HOP_LENGTH)) for window in windows)
