"""Evaluation: word error rate, multiple-choice accuracy and exact match over a data set of conversations."""

from audioflamingo.evaluation.evaluate import Evaluation, evaluate
from audioflamingo.evaluation.scoring import ItemResult, Summary, normalize

__all__ = ["Evaluation", "ItemResult", "Summary", "evaluate", "normalize"]
