"""The public model: the network (`network`), loaded and saved (`checkpoint`), that answers (`engine`)."""

from __future__ import annotations

from audioflamingo.checkpoint.pretrained import PretrainedAudioFlamingo3
from audioflamingo.engine.generate import generate as _generate
from audioflamingo.engine.generate import stream as _stream
from audioflamingo.network.af3 import AudioFlamingo3Model

__all__ = ["AudioFlamingo3ForConditionalGeneration", "AudioFlamingo3Model"]


class AudioFlamingo3ForConditionalGeneration(PretrainedAudioFlamingo3):
    """Audio Flamingo 3 with its output layer: the class to load, run, train and save.

    Args:
        config: architecture; the weights start random (`from_pretrained` loads trained ones).
    """

    generate = _generate
    stream = _stream
