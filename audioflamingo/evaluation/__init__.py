"""Evaluation: benchmarks by name and data sets of conversations, answered, scored, compared, reported.

The parts are imported when first used, so that reading the options costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audioflamingo.evaluation.compare import Comparison, compare_runs
    from audioflamingo.evaluation.evaluate_dataset import Evaluation, answer_rows, evaluate
    from audioflamingo.evaluation.evaluation_options import EvaluationOptions
    from audioflamingo.evaluation.scoring import ItemResult, Summary, normalize, summarize

_HOMES = {
    "Comparison": "compare",
    "Evaluation": "evaluate_dataset",
    "EvaluationOptions": "evaluation_options",
    "ItemResult": "scoring",
    "Summary": "scoring",
    "answer_rows": "evaluate_dataset",
    "compare_runs": "compare",
    "evaluate": "evaluate_dataset",
    "normalize": "scoring",
    "summarize": "scoring",
}

__all__ = [
    "Comparison",
    "Evaluation",
    "EvaluationOptions",
    "ItemResult",
    "Summary",
    "answer_rows",
    "compare_runs",
    "evaluate",
    "normalize",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
