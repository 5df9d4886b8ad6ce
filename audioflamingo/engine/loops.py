"""Tells a transcript from a model that repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_REPEATS = 4  # of a short unit; people do say things three times
MIN_LONG_REPEATS = 3  # of a long one
LONG_UNIT = 16  # tokens
MIN_REPEATED = 16  # tokens that only repeat; "no, no, no, no" is speech


def find_loop(tokens: Sequence[int]) -> int | None:
    """Looks for a run of tokens that repeats a unit of any length again and again.

    Args:
        tokens: ids of an answer, without its end token.

    Returns:
        How many tokens stand before the repetition, its first unit included; None if there is no loop.
    """
    ids = np.asarray(tokens)
    found: list[int] = []
    for unit in range(1, len(ids) // 2 + 1):
        repeats = MIN_LONG_REPEATS if unit >= LONG_UNIT else MIN_REPEATS
        needed = max(MIN_REPEATED, (repeats - 1) * unit)
        if needed > len(ids) - unit:
            continue
        differs = np.flatnonzero(ids[unit:] != ids[:-unit])
        edges = np.concatenate([[-1], differs, [len(ids) - unit]])
        runs = (
            np.diff(edges) - 1
        )  # lengths of the stretches in which every token equals the one a unit before
        long_enough = np.flatnonzero(runs >= needed)
        if len(long_enough):
            found.append(int(edges[long_enough[0]]) + 1 + unit)
    return min(found) if found else None
