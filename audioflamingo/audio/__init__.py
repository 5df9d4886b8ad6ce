"""From audio of any kind to the encoder's input: sources -> decoding -> loading (waveform, windows) -> features."""

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor, log_mel_spectrogram
from audioflamingo.audio.loading import (
    SAMPLING_RATE,
    conv_length,
    load_audio,
    num_audio_tokens,
    split_windows,
    stream_audio,
)

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
