"""Keys and values of the language model for the tokens it has seen, preallocated.

Each row of a `KVCache` holds the real tokens of one sequence and nothing else: padding never enters it, so rows of
different lengths stand side by side, each starting at slot 0. How far a row is filled is known here and nowhere else.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from audioflamingo.errors import ArgumentError, ContextLengthError


class Cache(Protocol):
    """What the language model needs of a cache."""

    lengths: list[int]  # tokens that each row holds

    def reserve(self, num_new: list[int]) -> None:
        """Makes room for `num_new[b]` more tokens in row b."""
        ...

    def write(
        self, layer: int, keys: Tensor, values: Tensor, num_new: list[int]
    ) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
        """Stores `(N, K, E)` new keys and values behind those of each row.

        Returns either the buffers of all rows, `(B, K, slots, E)` with each row's first token in slot 0, or for each
        row its own keys and values up to the last new one, `(1, K, L, E)`.
        """
        ...

    def advance(self, num_new: list[int]) -> None:
        """Counts the new tokens in, once every layer has written them."""
        ...


class KVCache:
    """Preallocated keys and values, one buffer pair a layer, each `(B, K, max_length, E)`.

    Buffers are allocated when a layer first writes, on the device and in the dtype of what it writes, so layers that
    are spread over devices keep their part where they are. They start as zeros: a masked slot that held NaN would
    still spoil its row. Stored values are constants to autograd.

    Args:
        num_layers: layers of the language model.
        batch_size: number of rows.
        max_length: most tokens of a row; more are an error.
        initial_length: slots that are allocated at first, `max_length` by default; they double when they run out.

    Attributes:
        lengths: number of tokens that each row holds.
    """

    def __init__(
        self, num_layers: int, batch_size: int, max_length: int, initial_length: int | None = None
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ArgumentError(
                f"KVCache needs batch_size >= 1 and max_length >= 1, got {batch_size}, {max_length}."
            )
        self.max_length = max_length
        self._num_slots = max_length if initial_length is None else min(initial_length, max_length)
        self.lengths = [0] * batch_size
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Memory of the allocated buffers in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values) if t is not None)

    def reserve(self, num_new: list[int]) -> None:
        """Makes room for `num_new[b]` more tokens in row b.

        Raises:
            ArgumentError: another number of rows than the cache has.
            ContextLengthError: a row would overflow.
        """
        if len(num_new) != self.batch_size:
            raise ArgumentError(f"the cache has {self.batch_size} rows, the input {len(num_new)}.")
        needed = max(past + new for past, new in zip(self.lengths, num_new, strict=True))
        if needed > self.max_length:
            raise ContextLengthError(
                f"the cache holds {self.max_length} tokens a row, {needed} are needed; "
                "build it with a larger max_length."
            )
        if needed > self._num_slots:
            self._num_slots = min(self.max_length, max(needed, 2 * self._num_slots))
            self._reallocate(list(range(self.batch_size)))

    def write(self, layer: int, keys: Tensor, values: Tensor, num_new: list[int]) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of new tokens behind those of each row, without advancing the rows.

        Args:
            layer: index of the layer.
            keys: new keys of all rows one after the other, `(sum(num_new), K, E)`.
            values: new values, same shape.
            num_new: new tokens of each row.

        Returns:
            The layer's whole key and value buffers, `(B, K, slots, E)`.
        """
        if self._keys[layer] is None:
            shape = (self.batch_size, keys.shape[1], self._num_slots, keys.shape[2])
            self._keys[layer], self._values[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        key_buffer, value_buffer = self._keys[layer], self._values[layer]
        assert key_buffer is not None
        assert value_buffer is not None
        for buffer, new in ((key_buffer, keys.detach()), (value_buffer, values.detach())):
            if len(set(self.lengths)) == 1 and len(set(num_new)) == 1:
                past, count = self.lengths[0], num_new[0]
                buffer[:, :, past : past + count] = new.view(len(num_new), count, *new.shape[1:]).transpose(
                    1, 2
                )
            else:
                for row, (past, part) in enumerate(zip(self.lengths, new.split(num_new), strict=True)):
                    buffer[row, :, past : past + part.shape[0]] = part.transpose(0, 1)
        return key_buffer, value_buffer

    def advance(self, num_new: list[int]) -> None:
        """Counts the new tokens in, once every layer has written them."""
        self.lengths = [past + new for past, new in zip(self.lengths, num_new, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Keeps the named rows, in that order; a row may be named several times. Works in place."""
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise ArgumentError(f"rows {rows} do not exist in a cache of {self.batch_size} rows.")
        if rows == list(range(self.batch_size)):
            return
        self._reallocate(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def _reallocate(self, rows: list[int]) -> None:
        """Moves the named rows into new buffers of the present number of slots."""
        used = max(self.lengths[row] for row in rows)
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    moved = buffer.new_zeros((len(rows), buffer.shape[1], self._num_slots, buffer.shape[3]))
                    index = torch.tensor(rows, device=buffer.device)
                    moved[:, :, :used] = buffer[:, :, :used].index_select(0, index)
                    buffers[layer] = moved

    def crop(self, lengths: list[int]) -> None:
        """Forgets the tail of each row, so that row b holds `lengths[b]` tokens. Nothing is copied."""
        if len(lengths) != self.batch_size or any(
            not 0 <= n <= have for n, have in zip(lengths, self.lengths, strict=True)
        ):
            raise ArgumentError(f"cannot crop rows of {self.lengths} tokens to {lengths}.")
        self.lengths = list(lengths)
