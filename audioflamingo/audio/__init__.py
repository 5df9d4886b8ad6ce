"""From audio of any kind to the encoder's input: sources -> decoding -> loading (waveform, windows) -> features.

The parts are imported when first used: the options of reading cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor, log_mel_spectrogram
    from audioflamingo.audio.loading import (
        SAMPLING_RATE,
        conv_length,
        load_audio,
        num_audio_tokens,
        split_windows,
        stream_audio,
    )

_IN_FEATURES = ("AudioFlamingo3FeatureExtractor", "log_mel_spectrogram")

__all__ = [
    "SAMPLING_RATE",
    "AudioFlamingo3FeatureExtractor",
    "conv_length",
    "load_audio",
    "log_mel_spectrogram",
    "num_audio_tokens",
    "split_windows",
    "stream_audio",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "features" if name in _IN_FEATURES else "loading"
    return getattr(import_module(f"{__name__}.{home}"), name)
