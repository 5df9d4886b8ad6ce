"""Transcripts held against each other as the Open ASR Leaderboard does: Whisper's English normaliser, word errors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from audioflamingo.errors import require
from audioflamingo.evaluation.scoring import EXTRA


def normalize_english(text: str) -> str:
    """Whisper's normalisation of English: numbers, spelling, contractions, no fillers and punctuation.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C; the package
    `whisper-normalizer`.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    return " ".join(_normalizer()(text).split())


@lru_cache(maxsize=1)
def _normalizer() -> Any:
    return require("whisper_normalizer.english", EXTRA, "whisper-normalizer").EnglishTextNormalizer()
