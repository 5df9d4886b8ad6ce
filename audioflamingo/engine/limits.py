"""How much the engine takes on. Imports nothing heavy, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass

from audioflamingo.fields import check_fields, option

_LIMITS = "Limits"


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine takes on.

    For `cache_tokens` None is what the running sequences need, and more when they need more; for `max_prefill_tokens`
    and `piece_s` it is no limit: prompts and clips are not cut into pieces, which is quickest where nobody waits.
    """

    max_rows: int = option(32, "Answers that the model gives at once.", at_least=1, group=_LIMITS)
    max_requests: int = option(
        32,
        "Requests that the model works for at once; it goes on with those that have had least of it.",
        at_least=1,
        group=_LIMITS,
    )
    cache_tokens: int | None = option(
        65536,
        "Tokens whose keys and values are kept, for running answers and for reuse; the memory is taken at once.",
        at_least=1,
        group=_LIMITS,
    )
    max_prefill_tokens: int | None = option(512, "Most prompt tokens in one step.", at_least=1, is_flag=False)
    piece_s: float | None = option(
        0.02,
        "How long a piece of a prompt or clip may hold up the answers beside it, roughly.",
        above=0,
        is_flag=False,
    )
    keeps_prefixes: bool = option(
        True,
        "Whether finished sequences stay, as far as there is room, for later ones that begin alike.",
        is_flag=False,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def alone(cls, max_rows: int, keeps_prefixes: bool = False) -> EngineOptions:
        """For a caller who drives the engine himself, with nobody waiting: memory as needed, nothing in pieces."""
        return cls(
            max_rows,
            max_requests=max_rows,
            cache_tokens=None,
            max_prefill_tokens=None,
            piece_s=None,
            keeps_prefixes=keeps_prefixes,
        )
