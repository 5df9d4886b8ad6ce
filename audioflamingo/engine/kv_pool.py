"""Slots for the sequences of an engine: a `KVStore`, and which stretches of it belong to nobody.

A sequence gets a span of consecutive slots when it starts, enough for its prompt and its longest answer, so a running
one can never run out. Attention reads a sequence where it lies: nothing is copied when requests join or leave the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from audioflamingo.errors import ContextLengthError
from audioflamingo.network.kv import KVCache, KVStore, KVView, PackedLayout, Span


class KVPool:
    """Spans of one store, handed out and taken back.

    From an empty pool they are handed out one behind the other, so sequences of equal size stand evenly spaced and
    attend in one call.

    Args:
        num_layers: layers of the language model.
        num_slots: tokens that fit; with `grows` at first.
        grows: add slots where there are too few.
        store: what they are of, none of it in use, in place of a new one of `num_slots`.

    Attributes:
        store: the keys and values. If the pool does not grow, its memory is taken in full when a layer first writes, so
            that an engine cannot grow into memory that is no longer there.
    """

    def __init__(
        self, num_layers: int, num_slots: int, grows: bool = False, store: KVStore | None = None
    ) -> None:
        self.store = KVStore(num_layers, num_slots, is_filled=not grows) if store is None else store
        num_slots = self.store.num_slots
        self._grows = grows
        self._free: list[tuple[int, int]] = (
            [(0, num_slots)] if num_slots else []
        )  # (start, count), never touching

    @property
    def num_slots(self) -> int:
        """Tokens that fit."""
        return self.store.num_slots

    @property
    def num_free(self) -> int:
        """Slots that belong to no span."""
        return sum(count for _, count in self._free)

    @property
    def num_bytes(self) -> int:
        """Memory of the allocated buffers in bytes."""
        return self.store.num_bytes

    def reserve_first(self) -> None:
        """Takes the first slot away for good, from a pool of which nothing is in use."""
        self._free = [(1, self.num_slots - 1)] if self.num_slots > 1 else []

    def allocate(self, num_slots: int) -> Span | None:
        """Takes the smallest free stretch that is long enough; None if there is none."""
        fitting = [(count, index) for index, (_, count) in enumerate(self._free) if count >= num_slots]
        if not fitting:
            return None
        count, index = min(fitting)
        start = self._free[index][0]
        self._free[index : index + 1] = [(start + num_slots, count - num_slots)] if count > num_slots else []
        return Span(start, num_slots)

    def allocate_new(self, num_slots: int) -> Span | None:
        """The same from slots that are added where the pool may grow; None where it may not.

        Once there is something to be moved, the pool grows by an eighth at least.
        """
        if not self._grows:
            return None
        last = self._free[-1][1] if self._free and sum(self._free[-1]) == self.num_slots else 0
        more = num_slots - last
        self.grow(max(more, self._step()) if self.num_bytes else more)
        return self.allocate(num_slots)

    def _step(self) -> int:
        """Slots that are added at least when what is stored has to move: few moves, and little room for nobody."""
        return self.num_slots // 8

    def extend(self, span: Span, num_slots: int) -> bool:
        """Gives a span more slots where it stands, to `num_slots` in all; False if those behind it are not free."""
        more, end = num_slots - span.num_slots, span.start + span.num_slots
        if more <= 0:
            return True
        index = next((i for i, (start, _) in enumerate(self._free) if start == end), None)
        room = 0 if index is None else self._free[index][1]
        if room < more and self._grows and end + room == self.num_slots:
            self.grow(max(more - room, self._step()))
            return self.extend(span, num_slots)
        if index is None or room < more:
            return False
        self._free[index : index + 1] = [(end + more, room - more)] if room > more else []
        span.num_slots = num_slots
        return True

    def free(self, span: Span, is_clean: bool = True) -> None:
        """Gives a span back.

        Args:
            span: empty afterwards.
            is_clean: its tokens are finite. Others are zeroed: the next owner's masked slots must not hold NaN.
        """
        if not is_clean:
            self.store.clear(span)
        self._give(span.start, span.num_slots)
        span.num_slots = span.length = 0

    def shrink(self, span: Span) -> None:
        """Gives back the slots of a span that hold no token."""
        rest, span.num_slots = span.num_slots - span.length, span.length
        if rest:
            self._give(span.start + span.length, rest)

    def grow(self, num_slots: int) -> None:
        """Adds so many free slots at the end. What is stored stays where it is."""
        end = self.num_slots
        self.store.resize(end + num_slots)
        self._give(end, num_slots)

    def _give(self, start: int, count: int) -> None:
        merged: list[tuple[int, int]] = []
        for stretch in sorted([*self._free, (start, count)]):
            if merged and sum(merged[-1]) == stretch[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + stretch[1])
            else:
                merged.append(stretch)
        self._free = merged

    def copy(self, source: Span, target: Span, num_tokens: int) -> None:
        """Copies the first tokens of one span to the start of another, which then holds just them."""
        self.store.copy(source, target, num_tokens)
        target.length = num_tokens

    def view(self, spans: Sequence[Span], num_new: Sequence[int], device: torch.device) -> KVView:
        """Shows some sequences to the network, one row each. The caller counts the new tokens in afterwards.

        Args:
            spans: the rows.
            num_new: tokens that the call adds to each.
            device: of the packed new tokens.

        Raises:
            ContextLengthError: a span has no room for them; spans do not grow.
        """
        for span, new in zip(spans, num_new, strict=True):
            if span.length + new > span.num_slots:
                raise ContextLengthError(
                    f"a sequence has room for {span.num_slots} tokens, {span.length + new} are needed."
                )
        return view_of(self.store, spans, num_new, device)


class CacheRows:
    """Rows of a caller's cache, which the engine continues in place of spans of its own pool.

    Args:
        cache: owns the spans; grows as they do.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def view(self, spans: Sequence[Span], num_new: Sequence[int], device: torch.device) -> KVView:
        """Shows some of the rows to the network; see `KVPool.view`."""
        counts = {id(span): new for span, new in zip(spans, num_new, strict=True)}
        self._cache.reserve([counts.get(id(span), 0) for span in self._cache.spans])
        return view_of(self._cache.store, spans, num_new, device)


def view_of(store: KVStore, spans: Sequence[Span], num_new: Sequence[int], device: torch.device) -> KVView:
    """Some sequences of a store, one row each, with so many new tokens."""
    starts, lengths = [span.start for span in spans], [span.length for span in spans]
    return KVView(
        store, PackedLayout.of(starts, lengths, num_new, device, room=[span.num_slots for span in spans])
    )
