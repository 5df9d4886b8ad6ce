"""Prompts -> one padded batch of tensors (`collate`), and back (`unbatch`): padding lives here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from audioflamingo.audio.loading import num_audio_tokens
from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import ArgumentError, ContextLengthError, PromptError
from audioflamingo.kernels.host import to_host
from audioflamingo.network.music_flamingo import window_indices
from audioflamingo.processor.processor_options import TextOptions
from audioflamingo.processor.prompt import Features, Prompt, place_windows

# Of transformers' tokenizers, with values that ask for what ours does anyway.
TOKENIZER_KEYWORDS: dict[str, tuple[Any, ...]] = {
    "padding": (False,),
    "truncation": (False,),
    "return_attention_mask": (True,),
    "return_token_type_ids": (False,),
    "return_offsets_mapping": (False,),
    "return_special_tokens_mask": (False,),
    "return_length": (False,),
    "is_split_into_words": (False,),
    "verbose": (True, False),
    "return_tensors": (),
    "max_length": (),
    "stride": (0,),
    "text_pair": (),
}


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
            **unknown: torch's `non_blocking` and the like; others are refused.

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


def collate(prompts: Sequence[Prompt], pad_token_id: int | None, options: TextOptions) -> BatchFeature:
    """Pads prompts into one batch.

    Args:
        prompts: at least one; all with labels, or none.
        pad_token_id: what to fill ids with; None if the tokenizer has no padding token.
        options: how far to pad, and on which side.

    Returns:
        `input_ids` and `attention_mask`, int64 (B, S), 1 where an id is real; where there are windows,
        `input_features` (W, M, T) of all prompts in order, and `input_features_mask`, int32 (W, T); `labels`, int64
        (B, S), `IGNORED_LABEL` on padding, where the prompts have some.

    Raises:
        ArgumentError: no prompt, or only some have labels.
        ContextLengthError: a prompt is longer than `max_length`.
        PromptError: the prompts differ in length and padding is off, or there is nothing to pad with.
    """
    labels = [prompt.labels for prompt in prompts if prompt.labels is not None]
    if not prompts or len(labels) not in (0, len(prompts)):
        raise ArgumentError(f"{len(labels)} of {len(prompts)} prompts have labels; it must be all or none.")
    ids, mask = _pad_rows([prompt.token_ids for prompt in prompts], pad_token_id, options)
    batch = BatchFeature({"input_ids": ids, "attention_mask": mask})
    if windows := [window for prompt in prompts for window in prompt.windows]:
        batch["input_features"] = torch.stack([window.features for window in windows])  # (W, M, T)
        num_frames = torch.tensor([window.num_frames for window in windows])
        frames = torch.arange(batch["input_features"].shape[-1])
        batch["input_features_mask"] = (frames < num_frames[:, None]).int()  # (W, T)
    if labels:
        batch["labels"], _ = _pad_rows(labels, IGNORED_LABEL, options)
    return batch


def unbatch(
    input_ids: Tensor,
    audio_token_id: int,
    attention_mask: Tensor | None = None,
    input_features: Tensor | None = None,
    input_features_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    hears_time: bool = False,
) -> list[Prompt]:
    """Takes the padding away: the prompts of a batch, whoever made it.

    Args:
        input_ids: whole numbers (B, S).
        audio_token_id: id of `<sound>`.
        attention_mask: see `unpad`.
        input_features: log-mel windows (W, M, T) of all rows in order.
        input_features_mask: (W, T), 1 on each window's valid frames, which come first; None when all are valid.
        pad_token_id: see `unpad`.
        hears_time: whether the model wants to know which window of its clip each one is; a clip is then a run of
            `<sound>`.

    Returns:
        B prompts. Their features are views.

    Raises:
        ArgumentError: a tensor of the wrong shape or type, or a row that is all padding.
        PromptError: the windows do not fit the audio tokens of the rows.
    """
    rows = unpad(input_ids, attention_mask, pad_token_id)
    windows = _real_windows(input_features, input_features_mask)
    prompts, first = [], 0
    for index, token_ids in enumerate(rows):
        num_left, last = token_ids.count(audio_token_id), first
        while last < len(windows) and (num_left > 0 or not num_audio_tokens(windows[last][1])):
            num_left -= num_audio_tokens(windows[last][1])
            last += 1
        if index == len(rows) - 1:
            last = len(windows)  # what is too much shows in the last row
        own = windows[first:last]
        indices = None
        if hears_time:
            indices = window_indices(token_ids, audio_token_id, [num_audio_tokens(n) for _, n in own])
        prompts.append(Prompt(token_ids, place_windows(token_ids, audio_token_id, own, indices)))
        first = last
    return prompts


def unpad(
    input_ids: Tensor, attention_mask: Tensor | None = None, pad_token_id: int | None = None
) -> list[list[int]]:
    """The ids of each row without its padding.

    Args:
        input_ids: whole numbers (B, S).
        attention_mask: (B, S), 0 on padding. Of a longer one, which covers a cache too, the end counts.
        pad_token_id: what is padding where there is no mask; None takes every id as real.

    Raises:
        ArgumentError: a tensor of the wrong shape or type, or a row that is all padding.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ArgumentError(
            f"input_ids must be a tensor of whole numbers (batch, length), got {_described(input_ids)}."
        )
    if 0 in input_ids.shape:
        raise ArgumentError(f"input_ids of shape {tuple(input_ids.shape)} hold no token.")
    num_rows, num_columns = input_ids.shape
    if attention_mask is None:
        is_real = torch.ones_like(input_ids) if pad_token_id is None else input_ids != pad_token_id
    else:
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else ()
        if len(shape) != 2 or shape[0] != num_rows or shape[1] < num_columns:
            raise ArgumentError(
                f"attention_mask must be a tensor {(num_rows, num_columns)} as input_ids, got "
                f"{_described(attention_mask)}."
            )
        is_real = attention_mask[:, -num_columns:].to(input_ids.device) != 0
    ids, keeps = to_host(torch.stack([input_ids.long(), is_real.long()]))
    rows = [list(compress(row, keep)) for row, keep in zip(ids, keeps, strict=True)]
    if [] in rows:
        raise ArgumentError(
            f"row {rows.index([])} of input_ids is all padding; pass attention_mask if it is not."
        )
    return rows


def _real_windows(features: Tensor | None, mask: Tensor | None) -> list[Features]:
    """Windows (W, M, T) one by one, each with the number of its valid frames."""
    if features is None:
        return []
    if not isinstance(features, Tensor) or features.dim() != 3 or not features.is_floating_point():
        raise ArgumentError(
            f"input_features must be a floating-point tensor (windows, mels, frames), got {_described(features)}."
        )
    num_windows, _, num_frames = features.shape
    lengths = [num_frames] * num_windows
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (num_windows, num_frames):
            raise ArgumentError(
                f"input_features_mask must be {(num_windows, num_frames)} as input_features, got {_described(mask)}."
            )
        is_valid = mask != 0
        frames = torch.arange(num_frames, device=mask.device)
        is_odd = (is_valid != (frames < is_valid.sum(1, keepdim=True))).any(1)
        lengths, odd = to_host(torch.stack([is_valid.sum(1), is_odd.long()]))
        if any(odd):
            raise ArgumentError(
                "input_features_mask must hold its ones first, then its zeros, in every window."
            )
    return list(zip(features, lengths, strict=True))


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"


def _pad_rows(
    rows: Sequence[Sequence[int]], pad_value: int | None, options: TextOptions
) -> tuple[Tensor, Tensor]:
    """Stacks rows of token ids. Returns ids int64 (B, S), and the mask int64 (B, S): 1 where an id is real."""
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
