"""Finished sequences that stay in the pool, so that a later request with the same beginning starts behind it.

The least recently used ones make room when a new sequence needs their slots.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from audioflamingo.engine.kv_pool import KVPool
from audioflamingo.network.kv import Span

MIN_REUSED = (
    16  # tokens; a shorter beginning, such as the system message's, is quicker computed than looked after
)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of equal entries at the start of two rows of identities."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


class PrefixCache:
    """Keeps finished sequences by the identities of their tokens (see `Prompt.identity`).

    Args:
        pool: where their keys and values lie.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._kept: OrderedDict[int, tuple[np.ndarray, Span]] = OrderedDict()
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_slots(self) -> int:
        """Slots of the pool that kept sequences take."""
        return sum(span.num_slots for _, span in self._kept.values())

    def find(self, identity: np.ndarray) -> tuple[Span | None, int]:
        """The kept sequence that shares the longest beginning, and the length of that; marks it as used."""
        best, best_length = None, 0
        for number, (kept, _) in self._kept.items():
            length = common_prefix(kept, identity)
            if length > best_length:
                best, best_length = number, length
        if best is None or best_length < MIN_REUSED:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best][1], best_length

    def keep(self, identity: np.ndarray, span: Span) -> None:
        """Takes over the span of a finished sequence whose tokens have these identities."""
        self._pool.shrink(span)
        identity = identity[: span.length]
        is_known = any(common_prefix(kept, identity) == len(identity) for kept, _ in self._kept.values())
        if len(identity) < MIN_REUSED or is_known:
            self._pool.free(span)
            return
        covered = [n for n, (kept, _) in self._kept.items() if common_prefix(kept, identity) == len(kept)]
        for number in covered:
            self._drop(number)
        self._kept[self._next_number] = (identity, span)
        self._next_number += 1

    def take_over(self, identity: np.ndarray, num_slots: int) -> Span | None:
        """Hands on the span of a kept sequence with which a new one begins, if it has room for that, nothing copied.

        Args:
            identity: of the new sequence's prompt.
            num_slots: slots that it needs.
        """
        for number, (kept, span) in self._kept.items():
            if MIN_REUSED <= len(kept) < len(identity) and common_prefix(kept, identity) == len(kept):
                if not self._pool.extend(span, num_slots):
                    return None
                del self._kept[number]
                return span
        return None

    def allocate(self, num_slots: int, wanted: Span | None) -> Span | None:
        """Takes slots from the pool, dropping kept sequences until there are enough in a row.

        Args:
            num_slots: how many.
            wanted: a kept sequence that is about to be copied; it is dropped last.

        Returns:
            The span; None if running sequences leave no room.
        """
        span = self._pool.allocate(num_slots)
        while span is None and any(kept is not wanted for _, kept in self._kept.values()):
            self._drop(next(number for number, (_, kept) in self._kept.items() if kept is not wanted))
            span = self._pool.allocate(num_slots)
        if span is None:
            span = self._pool.allocate_new(num_slots)
        if span is None and self._kept:
            self.clear()
            span = self._pool.allocate(num_slots)
        return span

    def clear(self) -> None:
        """Drops everything."""
        for number in list(self._kept):
            self._drop(number)

    def _drop(self, number: int) -> None:
        _, span = self._kept.pop(number)
        self._pool.free(span)
