"""What a data set is called, where it lies, and how much of it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from audioflamingo.errors import check


@dataclass(frozen=True)
class DatasetConfig:
    """One file of conversations.

    Attributes:
        path: JSONL of conversations, or NVIDIA's JSON.
        audio_dir: what audio paths are relative to; by default the file's folder.
        format: `auto` looks at the first row.
        weight: how often each row is seen in an epoch; 0.25 takes another random quarter each time.
        max_rows: take this many rows, chosen once at random by the run's seed.
        answer_weight: how much each token of this set's answers counts in the loss. A class name is one token in a
            thousand beside transcripts: raise it there.
    """

    path: str
    audio_dir: str | None = None
    format: Literal["auto", "conversations", "nvidia"] = "auto"
    weight: float = 1.0
    max_rows: int | None = None
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        check(self.weight > 0, f"weight must be above 0, got {self.weight}.")
        check(self.answer_weight > 0, f"answer_weight must be above 0, got {self.answer_weight}.")
        check(
            self.max_rows is None or self.max_rows > 0, f"max_rows must be at least 1, got {self.max_rows}."
        )
