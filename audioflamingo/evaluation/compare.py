"""Two runs over the same questions held against each other, item by item, with a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audioflamingo.errors import ArgumentError
from audioflamingo.evaluation.run_folder import read_run
from audioflamingo.evaluation.scoring import BOOTSTRAP_SEED, NUM_RESAMPLES, ItemResult, Summary, summarize
from audioflamingo.files import differences

NUM_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Comparison:
    """What changed between two runs, A and B, over the questions that both have.

    Attributes:
        changed_settings: what the answers depend on and is not the same.
        summaries: of A and of B.
        num_left_out: questions that only one of them has.
        gained, lost: ids right in B alone, in A alone.
        accuracy_p: chance of such a difference in what is right, or a larger one, if neither were better; None without
            questions that can be right.
        wer_difference: of B and A, and its 95 % interval; None without transcripts.
        wer_p: chance of such a difference in errors, or a larger one, if neither were better.
    """

    changed_settings: str
    summaries: tuple[Summary, Summary]
    num_left_out: int
    gained: list[str]
    lost: list[str]
    accuracy_p: float | None = None
    wer_difference: tuple[float, float, float] | None = None
    wer_p: float | None = None

    def __str__(self) -> str:
        a, b = self.summaries
        lines = [f"{a.num_items} questions in both" + self._left_out, f"settings: {self.changed_settings}"]
        if a.accuracy is not None and b.accuracy is not None:
            lines.append(
                f"right: {a.accuracy:.4f} -> {b.accuracy:.4f}; {len(self.gained)} gained, {len(self.lost)} lost; "
                f"McNemar's exact test p = {self.accuracy_p:.3g}"
            )
        if self.wer_difference is not None:
            difference, low, high = self.wer_difference
            lines.append(
                f"word error rate: {a.wer:.4f} -> {b.wer:.4f}; difference {difference:+.4f} ({low:+.4f} to "
                f"{high:+.4f}); paired permutation test p = {self.wer_p:.3g}"
            )
        lines += [f"gained  {id}" for id in self.gained] + [f"lost    {id}" for id in self.lost]
        return "\n".join(lines) + "\n"

    @property
    def _left_out(self) -> str:
        return f", {self.num_left_out} in one alone left out" if self.num_left_out else ""


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compares two folders that `evaluate` wrote.

    Raises:
        ArgumentError: one of them holds no run, or they have no question in common.
    """
    (manifest_a, items_a), (manifest_b, items_b) = read_run(a), read_run(b)
    by_id_a = {item.id: item for item in items_a.values()}
    by_id_b = {item.id: item for item in items_b.values()}
    common = [
        id
        for id, item in by_id_a.items()
        if id in by_id_b and by_id_b[id].reference == item.reference and by_id_b[id].scoring == item.scoring
    ]
    if not common:
        raise ArgumentError(f"{str(a)!r} and {str(b)!r} have no question in common.")
    first, second = [by_id_a[id] for id in common], [by_id_b[id] for id in common]
    num_left_out = len(by_id_a.keys() | by_id_b.keys()) - len(common)
    is_same = manifest_a == manifest_b
    changed = "the same" if is_same else differences(manifest_a, manifest_b)
    gained, lost = _changed(second, first), _changed(first, second)
    keyed = any(item.scoring in ("choice", "exact") for item in first)
    pairs = [pair for pair in zip(first, second, strict=True) if pair[0].scoring == "transcription"]
    wer_difference, wer_p = _word_errors(pairs) if pairs else (None, None)
    return Comparison(
        changed,
        (summarize(first), summarize(second)),
        num_left_out,
        gained,
        lost,
        mcnemar_p(len(gained), len(lost)) if keyed else None,
        wer_difference,
        wer_p,
    )


def _changed(right: Sequence[ItemResult], wrong: Sequence[ItemResult]) -> list[str]:
    """Ids of questions right in one run and wrong in the other; transcripts count by their errors, not here."""
    return [
        a.id
        for a, b in zip(right, wrong, strict=True)
        if a.scoring in ("choice", "exact") and a.is_correct and not b.is_correct
    ]


def mcnemar_p(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: chance of a split as uneven as this one of the questions that changed.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions", 1947, with the
    binomial distribution in place of its approximation.
    """
    num, least = gained + lost, min(gained, lost)
    tail = sum(math.comb(num, k) for k in range(least + 1)) / 2**num
    return min(1.0, 2 * tail)


def _word_errors(
    pairs: Sequence[tuple[ItemResult, ItemResult]],
) -> tuple[tuple[float, float, float], float]:
    """Difference of the word error rates with its bootstrap interval, and p of a permutation test, both paired."""
    change = np.array([b.num_errors - a.num_errors for a, b in pairs], dtype=float)
    words = np.array([a.num_words for a, _ in pairs], dtype=float)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    index = generator.integers(len(pairs), size=(NUM_RESAMPLES, len(pairs)))
    samples = change[index].sum(1) / np.maximum(1, words[index].sum(1))
    low, high = np.percentile(samples, [2.5, 97.5])
    changed = np.flatnonzero(change)
    signs = generator.integers(2, size=(NUM_PERMUTATIONS, len(changed))) * 2 - 1
    is_as_large = np.abs((signs * change[changed]).sum(1)) >= abs(change.sum())
    difference = float(change.sum() / max(1.0, words.sum()))
    return (difference, float(low), float(high)), float((is_as_large.sum() + 1) / (NUM_PERMUTATIONS + 1))
