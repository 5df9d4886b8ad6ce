"""Audio Flamingo 3 and its family, exact and standalone.

The names below are all that most programs need; the README shows how they go together. Each is imported when it is
first used, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from audioflamingo.lazy import lazy_names

if TYPE_CHECKING:
    from audioflamingo import errors
    from audioflamingo.audio import AudioFlamingo3FeatureExtractor, load_audio
    from audioflamingo.config import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        GenerationConfig,
        MusicFlamingoConfig,
        Qwen2Config,
    )
    from audioflamingo.engine.chat import Chat
    from audioflamingo.model import (
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Model,
        AutoModelForConditionalGeneration,
        MusicFlamingoForConditionalGeneration,
        MusicFlamingoModel,
    )
    from audioflamingo.network.encoder import AudioFlamingo3Encoder
    from audioflamingo.network.kv import KVCache
    from audioflamingo.network.projector import AudioFlamingo3MultiModalProjector
    from audioflamingo.processor import (
        AudioFlamingo3Processor,
        AutoProcessor,
        MusicFlamingoProcessor,
        StreamDecoder,
        Tokenizer,
    )
    from audioflamingo.processor.tokenizer import TextStreamer
    from audioflamingo.quantization import quantize
    from audioflamingo.transcription import transcribe

__version__ = "0.1.0"

_MODULE_OF = {
    "AudioFlamingo3Config": "config",
    "AudioFlamingo3Encoder": "network.encoder",
    "AudioFlamingo3EncoderConfig": "config",
    "AudioFlamingo3FeatureExtractor": "audio",
    "AudioFlamingo3ForConditionalGeneration": "model",
    "AudioFlamingo3Model": "model",
    "AudioFlamingo3MultiModalProjector": "network.projector",
    "AudioFlamingo3Processor": "processor",
    "AutoModelForConditionalGeneration": "model",
    "AutoProcessor": "processor",
    "Chat": "engine.chat",
    "GenerationConfig": "config",
    "KVCache": "network.kv",
    "MusicFlamingoConfig": "config",
    "MusicFlamingoForConditionalGeneration": "model",
    "MusicFlamingoModel": "model",
    "MusicFlamingoProcessor": "processor",
    "Qwen2Config": "config",
    "StreamDecoder": "processor",
    "TextStreamer": "processor.tokenizer",
    "Tokenizer": "processor",
    "load_audio": "audio",
    "quantize": "quantization",
    "transcribe": "transcription",
}

__all__ = [
    "AudioFlamingo3Config",
    "AudioFlamingo3Encoder",
    "AudioFlamingo3EncoderConfig",
    "AudioFlamingo3FeatureExtractor",
    "AudioFlamingo3ForConditionalGeneration",
    "AudioFlamingo3Model",
    "AudioFlamingo3MultiModalProjector",
    "AudioFlamingo3Processor",
    "AutoModelForConditionalGeneration",
    "AutoProcessor",
    "Chat",
    "GenerationConfig",
    "KVCache",
    "MusicFlamingoConfig",
    "MusicFlamingoForConditionalGeneration",
    "MusicFlamingoModel",
    "MusicFlamingoProcessor",
    "Qwen2Config",
    "StreamDecoder",
    "TextStreamer",
    "Tokenizer",
    "errors",
    "load_audio",
    "quantize",
    "transcribe",
]

_find = lazy_names(__name__, _MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("audioflamingo.errors")
    return _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
