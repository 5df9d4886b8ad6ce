"""Rows of unequal length -> one batch of tensors, and the dict that carries it to the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import ArgumentError, ContextLengthError, PromptError
from audioflamingo.processor.options import TextOptions


class BatchFeature(dict[str, Any]):
    """The inputs of a model by name, also as attributes: `inputs.input_ids` is `inputs["input_ids"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here, only {', '.join(self)}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(
        self, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **unknown: Any
    ) -> BatchFeature:
        """Copies the batch to a device, and its features to a floating-point dtype.

        Args:
            *args: a device, a dtype, or both, in any order.
            device: where to, for example `model.device`.
            dtype: for floating-point tensors; ids and masks keep theirs.

        Returns:
            A new batch; this one is unchanged.

        Raises:
            ArgumentError: an argument is neither device nor dtype, or the dtype holds whole numbers.
        """
        non_blocking = bool(unknown.pop("non_blocking", False))
        if unknown:
            raise ArgumentError(f"to() takes device, dtype and non_blocking, not {', '.join(unknown)}.")
        for value in args:
            if isinstance(value, torch.dtype) and dtype is None:
                dtype = value
            elif (
                isinstance(value, str | int | torch.device) and not isinstance(value, bool) and device is None
            ):
                device = value
            else:
                raise ArgumentError(f"to() takes one device and one dtype, got {value!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ArgumentError(f"to() changes features to a floating-point torch.dtype, not to {dtype!r}.")

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=wanted, non_blocking=non_blocking)

        return BatchFeature({name: move(value) for name, value in self.items()})


@dataclass(frozen=True)
class Row:
    """One prompt of a batch: its ids, and as many labels if there are to be any."""

    ids: list[int]
    labels: list[int] | None = None


def expand_audio(rows: Sequence[Row], audio_token_id: int, num_audio_tokens: Sequence[int]) -> list[Row]:
    """Repeats the one id that stands for a clip once for each of the clip's audio tokens.

    Args:
        rows: prompts with one `audio_token_id` for each clip.
        audio_token_id: id of `<sound>`.
        num_audio_tokens: for each clip of all rows, in order.

    Returns:
        The longer rows. Labels of audio positions are `IGNORED_LABEL`.
    """
    remaining = iter(num_audio_tokens)
    expanded = []
    for row in rows:
        ids: list[int] = []
        labels: list[int] = []
        for token_id, label in zip(row.ids, row.ids if row.labels is None else row.labels, strict=True):
            is_audio = token_id == audio_token_id
            count = next(remaining) if is_audio else 1
            ids.extend([token_id] * count)
            labels.extend([IGNORED_LABEL if is_audio else label] * count)
        expanded.append(Row(ids, None if row.labels is None else labels))
    return expanded


def pad_rows(
    rows: Sequence[Sequence[int]], pad_value: int | None, options: TextOptions
) -> tuple[Tensor, Tensor]:
    """Stacks rows of token ids.

    Args:
        rows: B rows.
        pad_value: what to fill with; None if the tokenizer has no padding token.
        options: how far, and on which side.

    Returns:
        ids int64 (B, S), and the mask int64 (B, S): 1 where an id is real.

    Raises:
        ContextLengthError: a row is longer than `max_length`.
        PromptError: the rows differ in length and padding is off, or there is nothing to pad with.
    """
    longest = max(map(len, rows))
    if options.max_length is not None and longest > options.max_length:
        raise ContextLengthError(
            f"a prompt has {longest} tokens, max_length allows {options.max_length}. Prompts are never cut: "
            "shorten the conversation or its audio (25 tokens a second), or raise max_length."
        )
    is_padded = options.padding not in (False, "do_not_pad")
    if not is_padded and any(len(row) != longest for row in rows):
        raise PromptError(f"padding is off, but the rows have {', '.join(map(str, map(len, rows)))} tokens.")
    length = (
        options.max_length if options.padding == "max_length" and options.max_length is not None else longest
    )
    if is_padded and options.pad_to_multiple_of is not None:
        length = math.ceil(length / options.pad_to_multiple_of) * options.pad_to_multiple_of
    if pad_value is None:
        if any(len(row) != length for row in rows):
            raise PromptError("the rows need padding, but the tokenizer names no padding token.")
        pad_value = 0
    ids = torch.full((len(rows), length), pad_value, dtype=torch.int64)  # (B, S)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)  # (B, S)
    for index, row in enumerate(rows):
        start = length - len(row) if options.padding_side == "left" else 0
        ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, start : start + len(row)] = 1
    return ids, mask
