"""Evaluation: word error rate, multiple-choice accuracy and exact match over a data set of conversations.

The parts are imported when first used, so that reading the options costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audioflamingo.evaluation.evaluate_dataset import Evaluation, answer_rows, evaluate
    from audioflamingo.evaluation.evaluation_options import EvaluationOptions
    from audioflamingo.evaluation.scoring import ItemResult, Summary, normalize, summarize

_HOMES = {
    "Evaluation": "evaluate_dataset",
    "EvaluationOptions": "evaluation_options",
    "ItemResult": "scoring",
    "Summary": "scoring",
    "answer_rows": "evaluate_dataset",
    "evaluate": "evaluate_dataset",
    "normalize": "scoring",
    "summarize": "scoring",
}

__all__ = [
    "Evaluation",
    "EvaluationOptions",
    "ItemResult",
    "Summary",
    "answer_rows",
    "evaluate",
    "normalize",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
