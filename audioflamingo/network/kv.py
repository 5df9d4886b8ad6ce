"""Keys and values of the tokens that the language model has seen, and where the tokens of one call belong among them.

A `KVStore` is a long row of slots, one token each. A sequence has a `Span` of consecutive slots and fills it from the
first one on; padding never enters it. One call's rows reach the network as a `KVView`: the store, and a `PackedLayout`
that says where the new tokens are written and what each row may look at. Who owns the spans counts the new tokens in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from audioflamingo.errors import ArgumentError, ContextLengthError

MASKED_EXCESS = 2  # one call for rows of unequal length may look at so many times the tokens that they hold


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
    length: int = 0


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
        buffer = new.new_zeros((new.shape[1], self.num_slots, new.shape[2]), requires_grad=False)
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
            found = buffer.narrow(1, source.start, num_tokens)
            buffer.narrow(1, target.start, num_tokens).copy_(found)

    def resize(self, num_slots: int) -> None:
        """Adds slots at the end until there are so many; what is stored stays where it is."""
        assert num_slots >= self.num_slots, "a store does not shrink"
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    larger = buffer.new_zeros((buffer.shape[0], num_slots, buffer.shape[2]))
                    larger[:, : self.num_slots] = buffer
                    buffers[layer] = larger
        self.num_slots = num_slots


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows next to each other that attend in one call: so many new tokens each, the first slots evenly spaced.

    Attributes:
        ends: keys of each row.
        num_new: new tokens of each row, T.
        first_slot: where the first row starts.
        spacing: slots from the start of one row to that of the next.
        mask: bool, broadcastable to `(rows, 1, T, L)`, True where a query may look; None for the causal rule alone.
    """

    ends: tuple[int, ...]
    num_new: int
    first_slot: int
    spacing: int
    mask: Tensor | None

    def rows_of(self, buffer: Tensor) -> Tensor:
        """What the rows look at, a view of `(K, slots, E)` as `(rows, K, L, E)`; L is the longest row's end."""
        num_rows, length = len(self.ends), max(self.ends)
        if num_rows == 1 or self.spacing == length:
            buffer = buffer.narrow(1, self.first_slot, num_rows * length)
            return buffer.unflatten(1, (num_rows, length)).transpose(0, 1)
        buffer = buffer.narrow(1, self.first_slot, (num_rows - 1) * self.spacing + length)
        return buffer.unfold(1, length, self.spacing).permute(1, 0, 3, 2)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the packed tokens of one call belong, and what each of its R rows may look at.

    The tokens of all rows stand one row after the other in one matrix. Layouts come from `of`, which knows all numbers
    on the host, or from `of_step`, which keeps tensors only.

    Attributes:
        positions: position of each token in its row, int64 `(N,)`.
        slots: slot that each token's key and value are written to, int64 `(N,)`.
        starts: first slot of each row, int64 `(R,)`.
        ends: tokens of each row after this call, which are the keys that it attends to, int64 `(R,)`.
        num_new: new tokens of each row; None in a captured step, as the next two.
        num_past: tokens that each row held before.
        first_slots: first slot of each row.
        num_slots: slots of the store; None when the new tokens attend to nothing but themselves.
        table: slots that each row reads in a captured step, `(R, window)`.
    """

    positions: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor
    num_new: tuple[int, ...] | None = None
    num_past: tuple[int, ...] | None = None
    first_slots: tuple[int, ...] | None = None
    num_slots: int | None = None
    table: Tensor | None = None

    @classmethod
    def of(
        cls,
        first_slots: Sequence[int],
        num_past: Sequence[int],
        num_new: Sequence[int],
        device: torch.device,
        position_ids: Tensor | None = None,
        num_slots: int | None = None,
    ) -> PackedLayout:
        """The layout of a call whose numbers are known on the host.

        Args:
            first_slots: first slot of each row.
            num_past: tokens that each row holds, from its first slot on.
            num_new: tokens that the call adds to each.
            device: where the tensors go: the device of the packed matrix.
            position_ids: positions of the packed tokens, `(N,)`, in place of those counted here.
            num_slots: slots of the store; without them rows of unequal length attend one by one.
        """
        ends = [past + new for past, new in zip(num_past, num_new, strict=True)]
        starts = [first + past for first, past in zip(first_slots, num_past, strict=True)]
        numbers = [
            *_ranges(num_past, num_new),  # positions
            *_ranges(starts, num_new),  # slots
            *first_slots,
            *ends,
        ]
        num_tokens, num_rows = sum(num_new), len(ends)
        sizes = [num_tokens, num_tokens, num_rows, num_rows]
        positions, slots, rows, tokens = torch.tensor(numbers, device=device).split(sizes)
        return cls(
            positions if position_ids is None else position_ids,
            slots,
            rows,
            tokens,
            num_new=tuple(num_new),
            num_past=tuple(num_past),
            first_slots=tuple(first_slots),
            num_slots=num_slots,
        )

    @classmethod
    def packed(
        cls, num_new: Sequence[int], device: torch.device, position_ids: Tensor | None = None
    ) -> PackedLayout:
        """The layout of a call without a store: each row begins behind the one before, and attends to itself."""
        first_slots = [end - new for end, new in zip(accumulate(num_new), num_new, strict=True)]
        return cls.of(first_slots, [0] * len(num_new), num_new, device, position_ids)

    @classmethod
    def of_step(
        cls, spans: Sequence[Span], window: int, num_slots: int, device: torch.device
    ) -> PackedLayout:
        """The layout of decode steps that are compiled or captured: one new token a row, tensors of fixed shape.

        Call `advance` between steps. To replay a step for other rows, copy their numbers into the tensors; a row of
        no use may stand on any slot that belongs to nobody, with `ends` 1.

        Args:
            spans: one for each row, with room for every step.
            window: slots that a row reads, the most tokens that a row reaches.
            num_slots: slots of the store.
            device: where the tensors go.
        """
        starts = torch.tensor([span.start for span in spans], device=device)
        positions = torch.tensor([span.length for span in spans], device=device)
        # What lies past the store belongs to no row; any slot does in its place, because it is masked.
        table = (starts[:, None] + torch.arange(window, device=device)).clamp(max=num_slots - 1)
        return cls(positions, starts + positions, starts, positions + 1, table=table)

    def advance(self) -> None:
        """Goes one token on, in place: what a step from `of_step` needs before the next."""
        for tensor in (self.positions, self.slots, self.ends):
            tensor.add_(1)

    @property
    def is_fresh(self) -> bool:
        """No row held a token before."""
        return self.num_past is not None and not any(self.num_past)

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The rows in the fewest calls of attention that need no copying, in order. Host numbers must be known."""
        assert self.num_new is not None
        groups, row = [], 0
        while row < len(self.num_new):
            end = self._end_of_run(row)
            groups.append(self._group(row, end))
            row = end
        return groups

    def _end_of_run(self, row: int) -> int:
        """The end of the longest run of rows from `row` on that can attend together."""
        assert self.num_new is not None
        assert self.num_past is not None
        assert self.first_slots is not None
        firsts, new, past = self.first_slots, self.num_new, self.num_past
        num_rows = len(new)
        is_equal, longest, total = True, past[row] + new[row], past[row] + new[row]
        end = row + 1
        spacing = firsts[end] - firsts[row] if end < num_rows else 0
        while end < num_rows and new[end] == new[row] and firsts[end] - firsts[end - 1] == spacing > 0:
            is_equal = is_equal and past[end] == past[row]
            longest, total = max(longest, past[end] + new[end]), total + past[end] + new[end]
            is_masked_well = (
                new[row] == 1
                and self.num_slots is not None
                and firsts[end] + longest <= self.num_slots
                and (end + 1 - row) * longest <= MASKED_EXCESS * total
            )
            if not (is_equal or is_masked_well):
                break
            end += 1
        return end

    def _group(self, row: int, end: int) -> RowGroup:
        assert self.num_new is not None
        assert self.num_past is not None
        assert self.first_slots is not None
        num_new = self.num_new[row]
        ends = tuple(past + num_new for past in self.num_past[row:end])
        longest, mask = max(ends), None
        device = self.ends.device
        if min(ends) < longest:
            mask = (torch.arange(longest, device=device) < self.ends[row:end, None])[:, None, None]
        elif num_new > 1 and self.num_past[row]:
            mask = causal_mask(num_new, longest, device)
        spacing = self.first_slots[row + 1] - self.first_slots[row] if end - row > 1 else longest
        return RowGroup(ends, num_new, self.first_slots[row], spacing, mask)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """True where a query may look: the queries are the last `num_queries` of the `num_keys` positions. `(T, L)`."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=num_keys - num_queries)


def _ranges(starts: Iterable[int], counts: Iterable[int]) -> list[int]:
    """So many consecutive numbers from each start on."""
    return [n for start, count in zip(starts, counts, strict=True) for n in range(start, start + count)]


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
        starts = [span.start for span in self.spans]
        num_slots = self.store.num_slots
        return KVView(
            self.store, PackedLayout.of(starts, self.lengths, num_new, device, position_ids, num_slots)
        )

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
