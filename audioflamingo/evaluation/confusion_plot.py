"""The confusion plot of an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from audioflamingo.evaluation.scoring import ItemResult
from audioflamingo.figures import new_figure, save_png

OTHER = "(other)"
MAX_LABELS = 40
MAX_LABEL_LENGTH = 28


def confusion(
    items: Sequence[ItemResult], max_labels: int = MAX_LABELS
) -> tuple[list[str], list[str], np.ndarray]:
    """Counts what was expected against what was answered, over multiple-choice and exact-match items.

    Returns:
        Row labels (expected, the most frequent ones), column labels (the same and `(other)`), counts `(n, n + 1)`.
    """
    pairs = [(item.expected, item.found) for item in items if item.scoring != "transcription"]
    rows = sorted(label for label, _ in Counter(expected for expected, _ in pairs).most_common(max_labels))
    columns = [*rows, OTHER]
    counts = np.zeros((len(rows), len(columns)), dtype=int)
    for expected, found in pairs:
        if expected in rows:
            counts[rows.index(expected), columns.index(found) if found in rows else -1] += 1
    return rows, columns, counts


def plot_confusion(items: Sequence[ItemResult], path: Path) -> bool:
    """Writes the confusion table as PNG; False if there is nothing to plot.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    rows, columns, counts = confusion(items)
    if not rows:
        return False
    size = max(4.0, 0.35 * len(rows) + 3)
    figure = new_figure(size + 0.5, size)
    axes = figure.add_subplot()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [_short(label) for label in columns], rotation=90)
    axes.set_yticks(range(len(rows)), [_short(label) for label in rows])
    axes.set_xlabel("answered")
    axes.set_ylabel("expected")
    axes.set_title(f"{np.trace(counts)} of {counts.sum()} right")
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    save_png(figure, path, dpi=120)
    return True


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL_LENGTH else label[: MAX_LABEL_LENGTH - 1] + "…"
