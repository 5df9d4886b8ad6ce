"""Options of an evaluation. Imports nothing heavy, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass

from audioflamingo.fields import check_fields, option


@dataclass(frozen=True)
class EvaluationOptions:
    """How a data set is answered."""

    batch_size: int = option(16, "Questions that run together.", at_least=1)
    max_new_tokens: int = option(256, "Longest answer.", at_least=1)
    overwrite: bool = option(False, "Start again.")

    def __post_init__(self) -> None:
        check_fields(self)
