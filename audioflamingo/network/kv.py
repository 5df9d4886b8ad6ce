"""Keys and values of the tokens that the language model has seen, and where the tokens of one call belong among them.

A `KVStore` is a long row of slots, one token each. A sequence has a `Span` of consecutive slots and fills it from the
first one on; padding never enters it. One call's rows reach the network as a `KVView`: the store, and a `PackedLayout`
that says where the new tokens are written and what each row may look at. Who owns the spans counts the new tokens in.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from audioflamingo.errors import ArgumentError, ContextLengthError
from audioflamingo.network.row_layout import PackedLayout, Span

__all__ = ["KVCache", "KVStore", "KVView", "PackedLayout", "Span"]
OWN_MAPPING_BYTES = 1 << 20


class KVStore:
    """Keys and values of many sequences, one contiguous buffer pair `(K, slots, E)` a layer.

    Buffers are allocated when a layer first writes, on the device and in the dtype of what it writes, so layers that
    are spread over devices keep their part where they are. They start as zeros: a masked slot that held NaN would
    still spoil its row. Stored values are constants to autograd.

    Args:
        num_layers: layers of the language model.
        num_slots: tokens that fit.
        is_filled: write the zeros at once, so that the memory is taken with the allocation and not little by little.

    Attributes:
        num_slots: tokens that fit.
        keys, values: the buffers of each layer, None before it has written.
    """

    def __init__(self, num_layers: int, num_slots: int, is_filled: bool = False) -> None:
        self.num_slots = num_slots
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self._is_filled = is_filled

    @property
    def num_bytes(self) -> int:
        """Memory of the allocated buffers in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers())

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in (*self.keys, *self.values) if buffer is not None]

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of new tokens.

        Args:
            layer: index of the layer.
            keys: `(N, K, E)`.
            values: `(N, K, E)`.
            slots: the slot of each token, int64 `(N,)`.

        Returns:
            The layer's whole key and value buffers, `(K, slots, E)`.
        """
        key_buffer, value_buffer = self.keys[layer], self.values[layer]
        if key_buffer is None or value_buffer is None:
            key_buffer = self.keys[layer] = self._allocate(keys)
            value_buffer = self.values[layer] = self._allocate(values)
        slots = slots.to(key_buffer.device)
        key_buffer.index_copy_(1, slots, keys.detach().transpose(0, 1))
        value_buffer.index_copy_(1, slots, values.detach().transpose(0, 1))
        return key_buffer, value_buffer

    def _allocate(self, new: Tensor) -> Tensor:
        buffer = _zeros(new, new.shape[1], self.num_slots, new.shape[2])
        return buffer.zero_() if self._is_filled else buffer

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies the tokens in some slots to others, in every layer. All are read before any is written.

        Args:
            source: slots to read, int64 `(N,)`.
            target: slots to write, int64 `(N,)`.
        """
        for buffer in self._buffers():
            tokens = buffer.index_select(1, source.to(buffer.device))
            buffer.index_copy_(1, target.to(buffer.device), tokens)

    def copy(self, source: Span, target: Span, num_tokens: int) -> None:
        """Copies the first tokens of one span to the start of another, in every layer. Lengths are the owner's."""
        for buffer in self._buffers():
            found = buffer[:, source.start : source.start + num_tokens]
            buffer[:, target.start : target.start + num_tokens] = found

    def clear(self, span: Span) -> None:
        """Zeroes the slots of a span, in every layer: for tokens that are not finite, see above."""
        for buffer in self._buffers():
            buffer.narrow(1, span.start, span.num_slots).zero_()

    def resize(self, num_slots: int) -> None:
        """Adds slots at the end until there are so many; what is stored stays where it is."""
        assert num_slots >= self.num_slots, "a store does not shrink"
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    larger = _zeros(buffer, buffer.shape[0], num_slots, buffer.shape[2])
                    larger[:, : self.num_slots] = buffer
                    buffers[layer] = larger
        self.num_slots = num_slots


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of the dtype and device of a tensor, large ones on a CPU in a mapping of their own.

    In the heap of the C library a store that grows leaves holes in which nothing larger fits.
    """
    num_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or num_bytes < OWN_MAPPING_BYTES:
        return like.new_zeros(shape, requires_grad=False)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=like.dtype).view(shape)


class KVView:
    """The rows of one call as the network sees them.

    Args:
        store: holds earlier tokens and takes the new ones; None for a call that keeps nothing.
        layout: where the tokens belong.
    """

    def __init__(self, store: KVStore | None, layout: PackedLayout) -> None:
        self.store = store
        self.layout = layout

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' keys and values, each `(N, K, E)`.

        Returns:
            What `layout` speaks of: the buffers of the store, or without one the new tokens themselves, each
            `(K, slots, E)`. Gradients reach new tokens, as long as no row has a past.
        """
        if self.store is None:
            return keys.transpose(0, 1), values.transpose(0, 1)
        slots = self.layout.slots
        buffers = self.store.write(layer, keys, values, slots)
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad) and self.layout.is_fresh:
            slots = slots.to(keys.device)
            new = (keys.transpose(0, 1), values.transpose(0, 1))
            return buffers[0].index_copy(1, slots, new[0]), buffers[1].index_copy(1, slots, new[1])
        return buffers


class KVCache:
    """Keys and values of a batch: one span a row, evenly spaced, each filled as far as its row goes.

    Args:
        num_layers: layers of the language model.
        batch_size: number of rows.
        max_length: most tokens of a row; more are an error.
        initial_length: slots of a row that are allocated at first, `max_length` by default; they double when they run
            out.

    Attributes:
        spans: where each row lies. They move when the cache grows.
        store: the buffers.
    """

    def __init__(
        self, num_layers: int, batch_size: int, max_length: int, initial_length: int | None = None
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ArgumentError(
                f"KVCache needs batch_size >= 1 and max_length >= 1, got {batch_size}, {max_length}."
            )
        self.max_length = max_length
        self._row_slots = max_length if initial_length is None else min(initial_length, max_length)
        self.spans = [Span(row * self._row_slots, self._row_slots) for row in range(batch_size)]
        self.store = KVStore(num_layers, batch_size * self._row_slots)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.spans)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens that each row holds."""
        return [span.length for span in self.spans]

    @property
    def num_bytes(self) -> int:
        """Memory of the allocated buffers in bytes."""
        return self.store.num_bytes

    def reserve(self, num_new: Sequence[int]) -> None:
        """Makes room for `num_new[b]` more tokens in row b.

        Raises:
            ArgumentError: another number of rows than the cache has.
            ContextLengthError: a row would overflow.
        """
        if len(num_new) != self.batch_size:
            raise ArgumentError(f"the cache has {self.batch_size} rows, the input {len(num_new)}.")
        needed = max(span.length + new for span, new in zip(self.spans, num_new, strict=True))
        if needed > self.max_length:
            raise ContextLengthError(
                f"the cache holds {self.max_length} tokens a row, {needed} are needed; "
                "build it with a larger max_length."
            )
        if needed > self._row_slots:
            self._row_slots = min(self.max_length, max(needed, 2 * self._row_slots))
            self._arrange(list(range(self.batch_size)))

    def view(
        self, num_new: Sequence[int], device: torch.device, position_ids: Tensor | None = None
    ) -> KVView:
        """Makes room for new tokens, and shows the rows to the network.

        Args:
            num_new: tokens that come behind those of each row.
            device: of the packed new tokens.
            position_ids: their positions, `(N,)`, in place of those counted by row.

        Raises:
            ArgumentError, ContextLengthError: as `reserve`.
        """
        self.reserve(num_new)
        starts, room = [span.start for span in self.spans], [self._row_slots] * self.batch_size
        return KVView(self.store, PackedLayout.of(starts, self.lengths, num_new, device, position_ids, room))

    def advance(self, num_new: Sequence[int]) -> None:
        """Counts the new tokens in, once every layer has written them."""
        for span, new in zip(self.spans, num_new, strict=True):
            span.length += new

    def select(self, rows: list[int]) -> None:
        """Keeps the named rows, in that order; a row may be named several times. Works in place."""
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise ArgumentError(f"rows {rows} do not exist in a cache of {self.batch_size} rows.")
        self._arrange(rows)

    def _arrange(self, rows: list[int]) -> None:
        """Lays the named rows out evenly again, with the present number of slots each."""
        num_slots = len(rows) * self._row_slots
        if num_slots > self.store.num_slots:
            self.store.resize(num_slots)
        old = [(self.spans[row].start, self.spans[row].length) for row in rows]
        spans = [*self.spans[: len(rows)], *(Span(0, 0) for _ in rows[self.batch_size :])]
        source: list[int] = []
        target: list[int] = []
        for index, (span, (start, length)) in enumerate(zip(spans, old, strict=True)):
            span.start, span.num_slots, span.length = index * self._row_slots, self._row_slots, length
            if start != span.start:
                source += range(start, start + length)
                target += range(span.start, span.start + length)
        self.spans = spans
        if source:
            self.store.move(torch.tensor(source), torch.tensor(target))

    def crop(self, lengths: list[int]) -> None:
        """Forgets the tail of each row, so that row b holds `lengths[b]` tokens. Nothing is copied."""
        if len(lengths) != self.batch_size or any(
            not 0 <= n <= have for n, have in zip(lengths, self.lengths, strict=True)
        ):
            raise ArgumentError(f"cannot crop rows of {self.lengths} tokens to {lengths}.")
        for span, length in zip(self.spans, lengths, strict=True):
            span.length = length
