"""Evaluation: word error rate, multiple-choice accuracy and exact match over a data set of conversations."""

from audioflamingo.evaluation.evaluate import Evaluation, answer_rows, evaluate
from audioflamingo.evaluation.scoring import ItemResult, Summary, normalize, summarize

__all__ = ["Evaluation", "ItemResult", "Summary", "answer_rows", "evaluate", "normalize", "summarize"]
