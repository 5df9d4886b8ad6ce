"""How much the engine takes on. Imports nothing heavy, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass

from audioflamingo.errors import ArgumentError


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine takes on.

    Attributes:
        max_rows: answers that are given at the same time.
        max_requests: client requests (see `Share`) that answers are given for at the same time.
        cache_tokens: tokens whose keys and values are kept, of running and of finished answers together.
        max_prefill_tokens: most prompt tokens in one step.
        piece_s: how long a piece of a prompt or clip may hold up the answers beside it, roughly.
    """

    max_rows: int = 32
    max_requests: int = 32
    cache_tokens: int = 65536
    max_prefill_tokens: int = 512
    piece_s: float = 0.02

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_requests", "cache_tokens", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}.")
