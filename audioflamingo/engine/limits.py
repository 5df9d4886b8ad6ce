"""How much the engine takes on. Imports nothing heavy, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass

from audioflamingo.errors import ArgumentError


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine takes on.

    Attributes:
        max_rows: sequences that have slots of the cache at the same time.
        cache_tokens: tokens whose keys and values are kept, of running and of finished answers together; None takes
            what the running ones need, and more when they need more.
        max_prefill_tokens: most prompt tokens in one step; None for whole prompts.
        piece_s: how long a piece of a prompt or clip may hold up the answers beside it, roughly; None does not cut
            them into pieces, which is quickest where nobody waits.
        keeps_prefixes: whether finished sequences stay, as far as there is room, for later ones that begin alike.
    """

    max_rows: int = 32
    cache_tokens: int | None = 65536
    max_prefill_tokens: int | None = 512
    piece_s: float | None = 0.02
    keeps_prefixes: bool = True

    def __post_init__(self) -> None:
        for name in ("max_rows", "cache_tokens", "max_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}.")

    @classmethod
    def alone(cls, max_rows: int, keeps_prefixes: bool = False) -> EngineOptions:
        """For a caller who drives the engine himself, with nobody waiting: memory as needed, nothing in pieces."""
        return cls(max_rows, None, None, None, keeps_prefixes)
