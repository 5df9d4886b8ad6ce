"""Options of an evaluation. Imports nothing heavy, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from audioflamingo.fields import check_fields, check_value, option

SuiteName = Literal["mmau", "mmau-pro", "mmar", "mmsu", "muchomusic", "clotho-aqa", "librispeech", "open-asr"]
PromptStyle = Literal["nvidia", "official"]
By = Literal["generation", "likelihood"]
Normalizer = Literal["plain", "whisper"]
_BENCHMARK = "Benchmark"


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked, how, and how it is decided what was answered."""

    suite: SuiteName | None = option(
        None,
        "The benchmark that DATA is, as it was published; by default DATA are conversations.",
        group=_BENCHMARK,
    )
    prompts: PromptStyle = option(
        "nvidia", "Whose wording a benchmark's questions have: NVIDIA's, or its own.", group=_BENCHMARK
    )
    by: By = option(
        "generation",
        "Questions with options: read the option out of the answer, or take the most likely one.",
        group=_BENCHMARK,
    )
    normalizer: Normalizer = option(
        "plain",
        "How transcripts of conversations are compared. plain: without case and punctuation; whisper: English numbers, "
        "spelling and contractions are one, too, as benchmarks of speech have it.",
    )
    batch_size: int = option(16, "Questions that run together.", at_least=1)
    max_new_tokens: int = option(256, "Longest answer.", at_least=1)
    overwrite: bool = option(False, "Start again.")

    def __post_init__(self) -> None:
        check_fields(self)
        for name, allowed in (
            ("suite", (None, *get_args(SuiteName))),
            ("prompts", get_args(PromptStyle)),
            ("by", get_args(By)),
            ("normalizer", get_args(Normalizer)),
        ):
            listed = ", ".join(map(str, allowed))
            check_value(getattr(self, name) in allowed, name, getattr(self, name), f"one of {listed}")
        is_own = self.suite is None or self.normalizer == "plain"
        check_value(is_own, "normalizer", self.normalizer, "left out beside a suite, which has its own")
