"""Clips: from what the caller named to windows of samples and their features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.audio.loading import (
    HOP_LENGTH,
    check_waveform,
    load_audio,
    split_windows,
)
from audioflamingo.errors import ArgumentError, AudioError
from audioflamingo.processor.processor_options import AudioOptions
from audioflamingo.processor.prompt import Features


@dataclass(frozen=True, eq=False)
class Clip:
    """One audio of a conversation.

    Attributes:
        source: whatever `load_audio` takes.
        sampling_rate: Hz of an in-memory array, where one is stated for this clip.
        key: the key under which a message gave the source.
        name: what errors call it; None leaves its number.
    """

    source: Any
    sampling_rate: float | None = None
    key: str = "audio"
    name: str | None = None


def load_windows(
    clips: Sequence[Clip],
    feature_extractor: AudioFlamingo3FeatureExtractor,
    max_audio_len: float,
    options: AudioOptions,
) -> list[list[Features]]:
    """Loads clips, each source once, cuts them and computes their features.

    Returns:
        For each clip its windows.

    Raises:
        AudioError: a clip that cannot be read, is too short for one audio token, or too long where that is
            refused.
    """
    loaded: dict[Any, np.ndarray] = {}
    windows = []
    rates = options.rates(len(clips))
    for index, clip in enumerate(clips):
        rate = clip.sampling_rate
        if rate is None and isinstance(clip.source, np.ndarray | Tensor):
            rate = rates[index]
        key = (clip.source if isinstance(clip.source, str) else id(clip.source), rate)
        if key not in loaded:
            loaded[key] = load_audio(
                clip.source, sampling_rate=rate, target_rate=feature_extractor.sampling_rate
            )
        name = clip.name or f"clip {index}"
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
    encoded = iter(encode_windows([window for clip in windows for window in clip], feature_extractor))
    return [list(islice(encoded, len(clip))) for clip in windows]


def encode_windows(
    windows: Sequence[np.ndarray], feature_extractor: AudioFlamingo3FeatureExtractor
) -> list[Features]:
    """Log-mel features of windows of samples, and how many of their frames are valid."""
    if not windows:
        return []
    features, _ = feature_extractor.extract(windows)
    return [(row, math.ceil(len(window) / HOP_LENGTH)) for row, window in zip(features, windows, strict=True)]


def check_window(waveform: np.ndarray) -> None:
    """Checks one window of mono 16 kHz samples that was not loaded by `load_windows`.

    Raises:
        AudioError: too short for an audio token, or with NaN or infinite samples.
        ArgumentError: no float32 array (samples,).
    """
    if not isinstance(waveform, np.ndarray) or waveform.ndim != 1 or waveform.dtype != np.float32:
        found = f"{waveform.dtype} {waveform.shape}" if isinstance(waveform, np.ndarray) else repr(waveform)
        raise ArgumentError(f"waveform must be a float32 array (samples,), got {found:.80}.")
    check_waveform(waveform, "waveform")
    if not np.isfinite(waveform).all():
        raise AudioError("waveform has samples that are NaN or infinite.")
