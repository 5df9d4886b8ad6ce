"""Many answers at once from one model: continuous batching over a bounded pool of keys and values. Knows no HTTP."""

from audioflamingo.server.engine.engine import Engine
from audioflamingo.server.engine.prompt import Prompt, build_prompt
from audioflamingo.server.engine.request import (
    EngineRequest,
    EngineStoppedError,
    Output,
    Sampling,
    Share,
    TokenLogprob,
)
from audioflamingo.server.settings import EngineOptions

__all__ = [
    "Engine",
    "EngineOptions",
    "EngineRequest",
    "EngineStoppedError",
    "Output",
    "Prompt",
    "Sampling",
    "Share",
    "TokenLogprob",
    "build_prompt",
]
