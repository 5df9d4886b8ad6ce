"""Who waits, whose prompt is being read, who is being answered: the engine's rows and their slots in the pool.

Only the model's thread touches it; other threads may look at the lengths of its lists.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from audioflamingo.engine.kv_pool import KVPool, Span
from audioflamingo.engine.prefix_cache import MIN_REUSED, PrefixCache, common_prefix
from audioflamingo.engine.sequence import Row

PATIENCE = 0.1  # a second of waiting weighs as much as so many seconds of the model: nobody waits for ever


class Schedule:
    """The rows of the engine.

    Args:
        pool: where their keys and values go.
        max_rows: rows that have slots at the same time.
        max_requests: client requests that they belong to.

    Attributes:
        waiting: rows without slots, in the order of arrival.
        reading: rows whose prompt is not done.
        answering: rows that get a token every step.
        kept: finished rows, for later ones to start from.
    """

    def __init__(self, pool: KVPool, max_rows: int, max_requests: int) -> None:
        self._pool = pool
        self._max_rows = max_rows
        self._max_requests = max_requests
        self.waiting: list[Row] = []
        self.reading: list[Row] = []
        self.answering: list[Row] = []
        self.kept = PrefixCache(pool)

    @property
    def active(self) -> list[Row]:
        """Rows that have slots."""
        return self.answering + self.reading

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return self.active + self.waiting

    def add(self, rows: Iterable[Row]) -> None:
        """Takes new rows."""
        self.waiting.extend(rows)

    def in_turn(self, rows: list[Row]) -> list[Row]:
        """Rows in the order in which they go on: whoever has had least first, waiting counted in."""
        now = time.monotonic()
        return sorted(rows, key=lambda row: row.request.share.service_s - PATIENCE * (now - row.arrived))

    def drop_cancelled(self) -> None:
        """Lets rows go whose client is gone."""
        for row in [row for row in self.rows if row.request.is_cancelled]:
            self.finish(row)

    def admit(self) -> int:
        """Gives slots to waiting rows while there are any; returns the tokens that need not be computed again.

        The first one that does not fit is waited for, so that a large request is not overtaken for ever.
        """
        num_reused = 0
        for row in self.in_turn(self.waiting) if self.waiting else []:
            if len(self.active) >= self._max_rows:
                break
            if not self._may_join(row) or self._is_being_read(row):
                continue
            source, length = self._find_source(row)
            span = self.kept.allocate(row.num_slots, source)
            if span is None:
                break
            row.span = span
            if source is not None and source.length >= length:  # not dropped to make room
                self._pool.copy(source, span, length)
                row.num_reused = length
                num_reused += length
            self.waiting.remove(row)
            self.reading.append(row)
        return num_reused

    def _may_join(self, row: Row) -> bool:
        """Whether the number of client requests that are worked for allows for a row."""
        shares = {other.request.share for other in self.active}
        return row.request.share in shares or len(shares) < self._max_requests

    def _is_being_read(self, row: Row) -> bool:
        """Whether another row is computing a beginning that this one shares: it is then worth waiting for."""
        most = len(row.prompt.token_ids) - 1
        for other in self.reading:
            shared = min(most, common_prefix(other.prompt.identity, row.prompt.identity))
            if other.span is not None and shared - other.span.length >= MIN_REUSED:
                return True
        return False

    def _find_source(self, row: Row) -> tuple[Span | None, int]:
        """Where the longest beginning of a row's prompt lies already, and its length."""
        source, length = self.kept.find(row.prompt.identity)
        for other in self.active:
            assert other.span is not None
            shared = common_prefix(other.prompt.identity, row.prompt.identity)
            shared = min(shared, other.span.length)
            if shared > max(length, MIN_REUSED - 1):
                source, length = other.span, shared
        return source, min(length, len(row.prompt.token_ids) - 1)

    def begin_answer(self, row: Row) -> None:
        """Moves a row whose prompt is done."""
        self.reading.remove(row)
        self.answering.append(row)

    def finish(self, row: Row, is_kept: bool = True) -> None:
        """Lets a row go; what it computed stays for later ones, or its slots are free again."""
        for rows in (self.waiting, self.reading, self.answering):
            if row in rows:
                rows.remove(row)
        span, row.span = row.span, None
        if span is None:
            return
        if is_kept:
            self.kept.keep(row.identity, span)
        else:
            self._pool.free(span)

    def forget(self) -> None:
        """Drops every finished row."""
        self.kept.clear()
