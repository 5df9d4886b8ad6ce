"""Keys and values of every sequence that the server holds, in one pool that never grows.

The pool is a long row of slots, one token each. A sequence gets a span of consecutive slots when it starts, enough for
its prompt and its longest answer, so a running one can never run out. Attention reads a sequence where it lies:
nothing is copied when requests join or leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from audioflamingo.errors import ContextLengthError


@dataclass(eq=False)
class Span:
    """Consecutive slots of a sequence.

    Attributes:
        start: the first slot.
        num_slots: how many.
        length: slots that hold a token already, from the first on.
    """

    start: int
    num_slots: int
    length: int = field(default=0)


class KVPool:
    """Preallocated keys and values, one buffer pair a layer, each `(1, K, slots, E)`.

    Buffers are allocated when a layer first writes, where and in what it writes.

    Args:
        num_layers: layers of the language model.
        num_slots: tokens that fit.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._free: list[tuple[int, int]] = [(0, num_slots)]  # (start, count), in order, never touching

    @property
    def num_free(self) -> int:
        """Slots that belong to no span."""
        return sum(count for _, count in self._free)

    @property
    def num_bytes(self) -> int:
        """Memory of the allocated buffers in bytes."""
        return sum(t.nbytes for t in (*self._keys, *self._values) if t is not None)

    def allocate(self, num_slots: int) -> Span | None:
        """Takes the smallest free stretch that is long enough; None if there is none."""
        fitting = [(count, index) for index, (_, count) in enumerate(self._free) if count >= num_slots]
        if not fitting:
            return None
        count, index = min(fitting)
        start = self._free[index][0]
        self._free[index : index + 1] = [(start + num_slots, count - num_slots)] if count > num_slots else []
        return Span(start, num_slots)

    def free(self, span: Span) -> None:
        """Gives a span back."""
        self._give(span.start, span.num_slots)
        span.num_slots = span.length = 0

    def shrink(self, span: Span) -> None:
        """Gives back the slots of a span that hold no token."""
        rest, span.num_slots = span.num_slots - span.length, span.length
        if rest:
            self._give(span.start + span.length, rest)

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
        for buffer in (*self._keys, *self._values):
            if buffer is not None:
                found = buffer.narrow(2, source.start, num_tokens)
                buffer.narrow(2, target.start, num_tokens).copy_(found)
        target.length = num_tokens

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Stores `(N, K, E)` keys and values in the named slots `(N,)`. Returns the layer's buffers."""
        if self._keys[layer] is None:
            shape = (1, keys.shape[1], self.num_slots, keys.shape[2])
            # Filled, not only reserved: the memory is then taken at the start, and the server cannot grow into it.
            self._keys[layer] = keys.new_empty(shape).fill_(0)
            self._values[layer] = values.new_empty(shape).fill_(0)
        key_buffer, value_buffer = self._keys[layer], self._values[layer]
        assert key_buffer is not None
        assert value_buffer is not None
        slots = slots.to(key_buffer.device)
        key_buffer.index_copy_(2, slots, keys.transpose(0, 1)[None])
        value_buffer.index_copy_(2, slots, values.transpose(0, 1)[None])
        return key_buffer, value_buffer


class PooledRows:
    """The sequences of one step as the cache of the language model, one row a span.

    Args:
        pool: where the spans lie.
        spans: one for each row.
        num_new: tokens that the step adds to each.
    """

    def __init__(self, pool: KVPool, spans: Sequence[Span], num_new: Sequence[int]) -> None:
        self._pool = pool
        self._spans = spans
        self.lengths = [span.length for span in spans]
        self._ends = [span.length + new for span, new in zip(spans, num_new, strict=True)]
        firsts = [span.start + span.length for span in spans]
        self._slots = torch.tensor(
            [first + i for first, new in zip(firsts, num_new, strict=True) for i in range(new)]
        )

    def reserve(self, num_new: list[int]) -> None:
        """Checks that the new tokens fit; spans do not grow.

        Raises:
            ContextLengthError: they do not.
        """
        for span, new in zip(self._spans, num_new, strict=True):
            if span.length + new > span.num_slots:
                raise ContextLengthError(
                    f"a sequence has room for {span.num_slots} tokens, {span.length + new} are needed."
                )

    def write(
        self, layer: int, keys: Tensor, values: Tensor, num_new: list[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Stores the new tokens of all rows; returns what each row attends to, `(1, K, L, E)`."""
        key_buffer, value_buffer = self._pool.write(layer, keys, values, self._slots)
        return [
            (key_buffer.narrow(2, span.start, end), value_buffer.narrow(2, span.start, end))
            for span, end in zip(self._spans, self._ends, strict=True)
        ]

    def advance(self, num_new: list[int]) -> None:
        """Counts the new tokens in."""
        for span, new in zip(self._spans, num_new, strict=True):
            span.length += new
        self.lengths = [span.length for span in self._spans]
