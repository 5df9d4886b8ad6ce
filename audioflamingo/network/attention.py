"""Scaled dot-product attention, twice: a plain reference, and torch's fused kernel.

Both take `(B, H, T, E)` queries against `(B, K, L, E)` keys and values, where K divides H (grouped queries). The
reference also returns its weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from audioflamingo.kernels.bfloat16 import is_slow

AttentionImplementation = Literal["eager", "sdpa"]
ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = ("eager", "sdpa")


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """True where a query may look: the queries are the last `num_queries` of the `num_keys` positions. `(T, L)`."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return mask.tril(diagonal=num_keys - num_queries)


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
        query, key, value = query.float(), key.float(), value.float()
        return sdpa_attention(query, key, value, mask, scale, dropout, is_causal).bfloat16()
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
        is_causal: the queries are the last T of the L positions and look back only. Not together with `mask`.

    Returns:
        The output `(B, H, T, E)`, and the weights `(B, H, T, L)` from `"eager"`, else None.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal and num_queries == 1:
        is_causal = False
    if is_causal and (implementation == "eager" or num_queries != num_keys):
        mask, is_causal = causal_mask(num_queries, num_keys, query.device), False
    if implementation == "eager":
        return eager_attention(query, key, value, mask, scale, dropout)
    return sdpa_attention(query, key, value, mask, scale, dropout, is_causal), None
