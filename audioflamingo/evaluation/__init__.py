"""Evaluation: benchmarks by name and data sets of conversations, answered, scored, compared, reported.

The parts are imported when first used, so that reading the options costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from audioflamingo.lazy import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
