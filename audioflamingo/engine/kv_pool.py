"""Slots for the sequences of an engine: a `KVStore`, and which stretches of it belong to nobody.

A sequence gets a span of consecutive slots when it starts, enough for its prompt and its longest answer, so a running
one can never run out. Attention reads a sequence where it lies: nothing is copied when requests join or leave the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from audioflamingo.errors import ContextLengthError
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span

__all__ = ["KVPool", "Span"]


class KVPool:
    """Spans of one store, handed out and taken back.

    From an empty pool they are handed out one behind the other, so sequences of equal size stand evenly spaced and
    attend in one call.

    Args:
        num_layers: layers of the language model.
        num_slots: tokens that fit.

    Attributes:
        store: the keys and values. Its memory is taken in full when a layer first writes, so that an engine cannot
            grow into memory that is no longer there.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.store = KVStore(num_layers, num_slots, is_filled=True)
        self._free: list[tuple[int, int]] = [(0, num_slots)]  # (start, count), in order, never touching

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

    def allocate(self, num_slots: int) -> Span | None:
        """Takes the smallest free stretch that is long enough; None if there is none."""
        fitting = [(count, index) for index, (_, count) in enumerate(self._free) if count >= num_slots]
        if not fitting:
            return None
        count, index = min(fitting)
        start = self._free[index][0]
        self._free[index : index + 1] = [(start + num_slots, count - num_slots)] if count > num_slots else []
        return Span(start, num_slots)

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
        starts, lengths = [span.start for span in spans], [span.length for span in spans]
        layout = PackedLayout.of(starts, lengths, num_new, device, room=[span.num_slots for span in spans])
        return KVView(self.store, layout)
