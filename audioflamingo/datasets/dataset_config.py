"""What a data set is called, where it lies, and how much of it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from audioflamingo.errors import check


@dataclass(frozen=True)
class DatasetConfig:
    """One data set.

    Attributes:
        path: JSON or JSONL, CSV or TSV, Parquet or Arrow, tar shards (WebDataset), or a folder of such files as Hugging
            Face's `datasets` writes it. `*` and `{000..015}` stand for several files.
        audio_dir: what audio paths are relative to; by default the file's folder.
        format: what a row is. `conversations`: our messages. `nvidia`: NVIDIA's. `swift`: ms-swift's messages or query
            and response. `columns`: one recording and its answer, as NeMo's manifests and tables have them. `auto`
            looks at the keys of each row.
        split: of a folder that holds several, such as `train`.
        prompt: what rows of columns without a question are asked, and their answer is learned as it is. Without it they
            are to be transcribed, and learned in the model's own sentence around a transcript.
        weight: how often each row is seen in an epoch; 0.25 takes another random quarter each time.
        max_rows: take this many rows, chosen once at random by the run's seed.
        answer_weight: how much each token of this set's answers counts in the loss. A class name is one token in a
            thousand beside transcripts: raise it there.
    """

    path: str
    audio_dir: str | None = None
    format: Literal["auto", "conversations", "nvidia", "swift", "columns"] = "auto"
    split: str | None = None
    prompt: str | None = None
    weight: float = 1.0
    max_rows: int | None = None
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        check(self.weight > 0, f"weight must be above 0, got {self.weight}.")
        check(self.answer_weight > 0, f"answer_weight must be above 0, got {self.answer_weight}.")
        check(
            self.max_rows is None or self.max_rows > 0, f"max_rows must be at least 1, got {self.max_rows}."
        )
