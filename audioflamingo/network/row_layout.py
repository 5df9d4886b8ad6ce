"""Where the tokens of one call belong among the slots of a store, and which rows attend together.

Nothing here holds keys or values: `kv` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from audioflamingo.kernels.host import to_device

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

    @cached_property
    def num_keys(self) -> int:
        """Keys of the longest row, L."""
        return max(self.ends)

    def rows_of(self, buffer: Tensor) -> Tensor:
        """What the rows look at, a view of `(K, slots, E)` as `(rows, K, L, E)`."""
        num_rows, length = len(self.ends), self.num_keys
        if buffer.requires_grad:
            buffer = buffer.narrow(1, self.first_slot, (num_rows - 1) * self.spacing + length)
            return buffer.unfold(1, length, self.spacing).permute(1, 0, 3, 2)
        head, slot, element = (
            buffer.stride()
        )  # the same view in one operation: every layer of every step asks for two
        return buffer.as_strided(
            (num_rows, buffer.shape[0], length, buffer.shape[2]),
            (self.spacing * slot, head, slot, element),
            buffer.storage_offset() + self.first_slot * slot,
        )


@dataclass(frozen=True, eq=False)
class Bounds:
    """The rows of one call as variable-length attention reads them: int32, on the device.

    Attributes:
        offsets: where each row's new tokens begin among the packed ones, and where the last row ends, `(R + 1,)`.
        starts: first slot of each row, and a number that is not read, `(R + 1,)`.
        ends: keys of each row, `(R,)`.
        most_new: no row has more new tokens.
        most_keys: no row has more keys.
    """

    offsets: Tensor
    starts: Tensor
    ends: Tensor
    most_new: int
    most_keys: int


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
        offsets: where each row begins among the packed tokens, and where the last one ends, int64 `(R + 1,)`.
        num_new: new tokens of each row; None in a captured step, as the next two.
        num_past: tokens that each row held before.
        first_slots: first slot of each row.
        room: slots of each row's span; None when the new tokens attend to nothing but themselves.
        window: of a captured step: no row has more keys.
    """

    positions: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor
    offsets: Tensor
    num_new: tuple[int, ...] | None = None
    num_past: tuple[int, ...] | None = None
    first_slots: tuple[int, ...] | None = None
    room: tuple[int, ...] | None = None
    window: int | None = None

    @classmethod
    def of(
        cls,
        first_slots: Sequence[int],
        num_past: Sequence[int],
        num_new: Sequence[int],
        device: torch.device,
        position_ids: Tensor | None = None,
        room: Sequence[int] | None = None,
    ) -> PackedLayout:
        """The layout of a call whose numbers are known on the host.

        Args:
            first_slots: first slot of each row.
            num_past: tokens that each row holds, from its first slot on.
            num_new: tokens that the call adds to each.
            device: where the tensors go: the device of the packed matrix.
            position_ids: positions of the packed tokens, `(N,)`, in place of those counted here.
            room: slots of each row's span; without them rows of unequal length attend one by one.
        """
        ends = [past + new for past, new in zip(num_past, num_new, strict=True)]
        starts = [first + past for first, past in zip(first_slots, num_past, strict=True)]
        numbers = [
            *_ranges(num_past, num_new),  # positions
            *_ranges(starts, num_new),  # slots
            *first_slots,
            *ends,
            *accumulate(num_new, initial=0),
        ]
        num_tokens, num_rows = sum(num_new), len(ends)
        sizes = [num_tokens, num_tokens, num_rows, num_rows, num_rows + 1]
        positions, slots, rows, tokens, offsets = to_device(numbers, device).split(sizes)
        return cls(
            positions if position_ids is None else position_ids,
            slots,
            rows,
            tokens,
            offsets,
            num_new=tuple(num_new),
            num_past=tuple(num_past),
            first_slots=tuple(first_slots),
            room=None if room is None else tuple(room),
        )

    @classmethod
    def packed(
        cls, num_new: Sequence[int], device: torch.device, position_ids: Tensor | None = None
    ) -> PackedLayout:
        """The layout of a call without a store: each row begins behind the one before, and attends to itself."""
        first_slots = [end - new for end, new in zip(accumulate(num_new), num_new, strict=True)]
        return cls.of(first_slots, [0] * len(num_new), num_new, device, position_ids)

    @classmethod
    def of_step(cls, spans: Sequence[Span], window: int, device: torch.device) -> PackedLayout:
        """The layout of decode steps that are compiled or captured: one new token a row, tensors of fixed shape.

        Call `advance` between steps. To replay a step for other rows, copy their numbers into the tensors; a row of
        no use may stand on any slot that belongs to nobody, with `ends` 1.

        Args:
            spans: one for each row, with room for every step.
            window: the most tokens that a row reaches.
            device: where the tensors go.
        """
        starts = torch.tensor([span.start for span in spans], device=device)
        positions = torch.tensor([span.length for span in spans], device=device)
        offsets = torch.arange(len(spans) + 1, device=device)
        return cls(positions, starts + positions, starts, positions + 1, offsets, window=window)

    def advance(self) -> None:
        """Goes one token on, in place: what a step from `of_step` needs before the next."""
        for tensor in (self.positions, self.slots, self.ends):
            tensor.add_(1)

    @cached_property
    def bounds(self) -> Bounds:
        """The rows for one call of variable-length attention. Nothing is read from the device."""
        most_new, most_keys = 1, self.window
        if self.num_new is not None and self.num_past is not None:
            most_new = max(self.num_new)
            most_keys = max(past + new for past, new in zip(self.num_past, self.num_new, strict=True))
        assert most_keys is not None
        starts = torch.nn.functional.pad(self.starts, (0, 1)).int()
        return Bounds(self.offsets.int(), starts, self.ends.int(), most_new, most_keys)

    def table(self, window: int) -> Tensor:
        """Slots that each row of a captured step reads, `(R, window)`; behind its keys the last of them again.

        That one is masked there: any other slot might hold NaN, and 0 times NaN is NaN.
        """
        places = torch.arange(window, device=self.ends.device).minimum(self.ends[:, None] - 1)
        return self.starts[:, None] + places

    @property
    def is_fresh(self) -> bool:
        """No row held a token before."""
        return self.num_past is not None and not any(self.num_past)

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The rows as calls of attention that copy nothing, few and in order. Host numbers must be known."""
        assert self.num_new is not None
        groups, row = [], 0
        while row < len(self.num_new):
            end = self._end_of_run(row)
            groups.append(self._group(row, end))
            row = end
        return groups

    @cached_property
    def group_sizes(self) -> list[int]:
        """New tokens of each group."""
        return [len(group.ends) * group.num_new for group in self.groups]

    def _end_of_run(self, row: int) -> int:
        """The end of the longest run of rows from `row` on that can attend together."""
        assert self.num_new is not None
        assert self.num_past is not None
        assert self.first_slots is not None
        firsts, new, past = self.first_slots, self.num_new, self.num_past
        num_rows = len(new)
        is_equal, longest, total = True, past[row] + new[row], past[row] + new[row]
        room = 0 if self.room is None else self.room[row]
        end = row + 1
        spacing = firsts[end] - firsts[row] if end < num_rows else 0
        while end < num_rows and new[end] == new[row] and firsts[end] - firsts[end - 1] == spacing > 0:
            is_equal = is_equal and past[end] == past[row]
            longest, total = max(longest, past[end] + new[end]), total + past[end] + new[end]
            room = 0 if self.room is None else min(room, self.room[end])
            # No row may look past its own span, not even at masked slots: another's could hold NaN, and 0 times NaN
            # is NaN.
            is_masked_well = longest <= room and (end + 1 - row) * longest <= MASKED_EXCESS * total
            if not (is_equal or (new[row] == 1 and is_masked_well)):
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
