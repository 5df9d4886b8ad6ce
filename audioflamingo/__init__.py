"""Audio Flamingo 3, exact and standalone.

The names below are all that most programs need; the README shows how they go together.
"""

from __future__ import annotations

from audioflamingo import errors
from audioflamingo.audio import load_audio
from audioflamingo.cache import KVCache
from audioflamingo.config import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    GenerationConfig,
    Qwen2Config,
)
from audioflamingo.encoder import AudioFlamingo3Encoder
from audioflamingo.features import AudioFlamingo3FeatureExtractor
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Model
from audioflamingo.processor import AudioFlamingo3Processor, AutoProcessor
from audioflamingo.projector import AudioFlamingo3MultiModalProjector
from audioflamingo.streamers import TextStreamer
from audioflamingo.tokenizer import StreamDecoder, Tokenizer

__version__ = "0.1.0"

__all__ = [
    "AudioFlamingo3Config",
    "AudioFlamingo3Encoder",
    "AudioFlamingo3EncoderConfig",
    "AudioFlamingo3FeatureExtractor",
    "AudioFlamingo3ForConditionalGeneration",
    "AudioFlamingo3Model",
    "AudioFlamingo3MultiModalProjector",
    "AudioFlamingo3Processor",
    "AutoProcessor",
    "GenerationConfig",
    "KVCache",
    "Qwen2Config",
    "StreamDecoder",
    "TextStreamer",
    "Tokenizer",
    "errors",
    "load_audio",
]
