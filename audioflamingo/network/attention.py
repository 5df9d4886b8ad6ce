"""Scaled dot-product attention: a plain reference, and fused kernels; and `attend_packed` over both.

Both take `(B, H, T, E)` queries against `(B, K, L, E)` keys and values, where K divides H (grouped queries). The
reference also returns its weights. `attend_packed` is how the language model attends, whatever stands in a batch: on a
GPU in one call of flash attention for rows of any length (arXiv 2307.08691), which reads no slot that is not a row's,
and likewise on a CPU while prompts are read, where this package's kernel is faster than torch's.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from audioflamingo.kernels import cpu_attention
from audioflamingo.kernels.halves import is_slow
from audioflamingo.network.row_layout import Bounds, PackedLayout, causal_mask

AttentionImplementation = Literal["eager", "sdpa"]
ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = ("eager", "sdpa")
MAX_FLASH_HEAD_DIM = 256
LEAST_CPU_QUERIES = 16  # of a row: laying out the keys for fewer costs more than it saves


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The formula written out: softmax(scale * Q K^T) V, softmax in float32.

    Args:
        query: `(B, H, T, E)`.
        key: `(B, K, L, E)`.
        value: `(B, K, L, E)`.
        mask: bool, broadcastable to `(B, 1, T, L)`, True where a query may look; None for everywhere.
        scale: factor of the scores.
        dropout: probability of dropping a weight.

    Returns:
        The output `(B, H, T, E)` and the weights `(B, H, T, L)`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)  # (B, H, L, E)
    scores = (query @ key.transpose(2, 3)) * scale  # (B, H, T, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    return F.dropout(weights, dropout) @ value, weights


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    is_causal: bool,
) -> Tensor:
    """The same through `torch.nn.functional.scaled_dot_product_attention`, `(B, H, T, E)`."""
    if is_slow(query, query.shape[2]):
        wide = query.float(), key.float(), value.float()
        return sdpa_attention(*wide, mask, scale, dropout, is_causal).to(query.dtype)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    implementation: AttentionImplementation,
    scale: float,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attends with the implementation that is asked for.

    Args:
        query: `(B, H, T, E)`.
        key: `(B, K, L, E)`.
        value: `(B, K, L, E)`.
        implementation: `"eager"` (the reference) or `"sdpa"`.
        scale: factor of the scores.
        dropout: probability of dropping a weight; 0 outside training.
        mask: bool `(B or 1, 1, T, L)`, True where a query may look.
        is_causal: queries look back only, there are as many as keys. Not together with `mask`.

    Returns:
        The output `(B, H, T, E)`, and the weights `(B, H, T, L)` from `"eager"`, else None.
    """
    if is_causal and implementation == "eager":
        mask, is_causal = causal_mask(query.shape[2], key.shape[2], query.device), False
    if implementation == "eager":
        return eager_attention(query, key, value, mask, scale, dropout)
    return sdpa_attention(query, key, value, mask, scale, dropout, is_causal), None


@cache
def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention runs on a device: an NVIDIA GPU of compute capability 8.0 or more."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def takes_any_lengths(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    implementation: AttentionImplementation,
    dropout: float,
    bounds: Bounds,
    is_causal: bool,
) -> bool:
    """Whether `attend_any_lengths` can be used, and is fast: nothing is trained, and half precision on a GPU."""
    if implementation != "sdpa" or dropout:
        return False
    if query.is_cpu:
        return cpu_attention.runs(query, keys, values) and cpu_attention.is_faster(
            query.dtype, query.shape[-1], bounds.most_new, is_causal
        )
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= MAX_FLASH_HEAD_DIM
        and not (torch.is_grad_enabled() and query.requires_grad)
        and has_flash(query.device)
    )


def attend_any_lengths(
    query: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, *, scale: float, is_causal: bool
) -> Tensor:
    """Attention of rows of any length to keys that lie anywhere, in one call: on a GPU of torch's flash attention.

    Args:
        query: of all rows, `(N, H, E)`.
        keys: `(slots, K, E)`, the last axis contiguous.
        values: likewise.
        bounds: where the rows are.
        scale: factor of the scores.
        is_causal: whether the last of a row's new tokens stands at its last key, and all look back only.

    Returns:
        `(N, H, E)`.
    """
    if query.is_cpu:
        rows = bounds.offsets, bounds.starts, bounds.ends
        return cpu_attention.attend_rows(query, keys, values, rows, scale=scale, is_causal=is_causal)
    device = query.device
    # The kernel takes where a row's keys start from `cum_seq_k`, and how many there are from `seqused_k`: so the rows
    # may lie in any order, with gaps between them.
    out = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        bounds.offsets.to(device),
        bounds.starts.to(device),
        bounds.most_new,
        bounds.most_keys,
        0.0,
        is_causal,
        False,
        scale=scale,
        seqused_k=bounds.ends.to(device),
    )[0]
    return out.reshape(query.shape)


def attend_packed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PackedLayout,
    *,
    implementation: AttentionImplementation,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Tensor, list[Tensor] | None]:
    """Causal attention of packed rows, each to its own keys and values among all that are stored.

    In half precision on a GPU all rows attend in one call, as do prompts on a CPU. Elsewhere rows that stand evenly
    spaced do, where they lie, and a captured step, whose numbers are on the device only, gathers a window of fixed
    width for each row.

    Args:
        query: of all rows' new tokens, `(N, H, E)`.
        keys: of all slots, `(K, slots, E)`.
        values: likewise.
        layout: where the rows are.
        implementation: `"eager"` (the reference) or `"sdpa"`.
        scale: factor of the scores.
        dropout: probability of dropping a weight; 0 outside training.

    Returns:
        The output `(N, H, E)`; and from `"eager"` the weights of each row, `(1, H, T, L)`, else None. A captured step
        gives no weights.
    """
    # One query a row may look everywhere, so a group of heads is as good as so many queries to one head: its keys and
    # values are then read once, not once a head.
    num_tokens, num_heads, head_dim = query.shape
    if _is_worth_one_call(query, layout):
        slots = keys.transpose(0, 1), values.transpose(0, 1)
        if takes_any_lengths(query, *slots, implementation, dropout, layout.bounds, is_causal=True):
            return attend_any_lengths(query, *slots, layout.bounds, scale=scale, is_causal=True), None
    folded = query.view(num_tokens, keys.shape[0], -1, head_dim)  # (N, K, H / K, E)
    if layout.window is not None:
        out = _attend_table(folded, keys, values, layout, layout.window, implementation, scale)
        return out.reshape(query.shape), None
    outputs, all_weights = [], []
    for group, queries in zip(layout.groups, folded.split(layout.group_sizes), strict=True):
        is_single = group.num_new == 1
        if not is_single:
            queries = queries.view(-1, group.num_new, num_heads, head_dim).transpose(1, 2)  # (rows, H, T, E)
        out, weights = attend(
            queries,
            group.rows_of(keys),
            group.rows_of(values),
            implementation=implementation,
            scale=scale,
            dropout=dropout,
            mask=None if group.mask is None else group.mask.to(query.device),
            is_causal=group.mask is None and not is_single,
        )
        outputs.append(out if is_single else out.transpose(1, 2).reshape(-1, *folded.shape[1:]))
        if weights is not None:
            weights = weights.reshape(weights.shape[0], num_heads, group.num_new, -1)  # (rows, H, T, L)
            all_weights += [w[..., :end] for w, end in zip(weights.split(1), group.ends, strict=True)]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # (N, K, H / K, E)
    return out.reshape(query.shape), all_weights or None


def _is_worth_one_call(query: Tensor, layout: PackedLayout) -> bool:
    """On a GPU always, on a CPU where every row reads a prompt."""
    return query.is_cuda or (layout.num_new is not None and min(layout.num_new) >= LEAST_CPU_QUERIES)


def _attend_table(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: PackedLayout,
    window: int,
    implementation: AttentionImplementation,
    scale: float,
) -> Tensor:
    """One new token a row, `(R, K, H / K, E)`: no value reaches the host, and no shape depends on one."""
    num_rows = len(query)
    slots = layout.table(window).flatten().to(keys.device)
    ends = layout.ends.to(keys.device)
    is_seen = torch.arange(window, device=keys.device) < ends[:, None]  # (R, window)
    key, value = (
        buffer.index_select(1, slots).unflatten(1, (num_rows, window)).transpose(0, 1)  # (R, K, window, E)
        for buffer in (keys, values)
    )
    mask = is_seen[:, None, None]
    out, _ = attend(query, key, value, implementation=implementation, scale=scale, mask=mask)
    return out
