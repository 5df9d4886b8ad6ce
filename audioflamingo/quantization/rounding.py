"""Weights to integers: scales are searched for, not read off the largest weight.

The error that is made small is `sum_k importance[k] * (weight[n, k] - rounded[n, k])**2` for each output channel n.
With `importance` the mean square of the layer's k-th input, that is the mean square error of the output, as far as
inputs are uncorrelated; without it all inputs count the same. Each search ends with the least-squares scale for the
integers that it found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7
# value * group scale is an int8 weight: up to 15 leaves room for -8, 16 to 18 for -7..7.
FULL_RANGE_SCALE = INT8_MAX // -INT4_MIN  # 15
LARGEST_SCALE = INT8_MAX // INT4_MAX  # 18

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max  # 448

INT8_CLIPS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8)  # of the channel's largest weight
NUM_GROUP_SCALES = 8  # candidates for each group, from the one that clips nothing downwards
NUM_ROUNDS = 2  # group scales for a channel scale, then a channel scale for the group scales
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8Weights:
    """`values * scales[:, None]` is the weight.

    Attributes:
        values: int8 `(N, K)` within -127..127.
        scales: float32 `(N,)`.
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Int4Weights:
    """`values * group_scales * scales[:, None]` is the weight, each group scale repeated over its group.

    Attributes:
        values: int8 `(N, K)` within -8..7.
        group_scales: uint8 `(N, K / group)`; `values * group_scales` lies within -127..127.
        scales: float32 `(N,)`.
    """

    values: Tensor
    group_scales: Tensor
    scales: Tensor


def round_int8(weight: Tensor, importance: Tensor | None = None) -> Int8Weights:
    """Rounds a matrix to int8 with one scale a row, searching how much of each row's range to clip.

    Args:
        weight: finite, any float dtype `(N, K)`.
        importance: float32 `(K,)`, not negative; None for equal.
    """
    w, sizes = _unit_rows(weight)
    h = _importance(importance, w)
    values, scales = torch.zeros_like(w), torch.zeros_like(sizes)
    best_error = torch.full_like(sizes, torch.inf)
    for clip in INT8_CLIPS:
        q = (w * (INT8_MAX / clip)).round_().clamp_(-INT8_MAX, INT8_MAX)
        scale = _least_squares(w, q, h)
        error = ((w - q * scale[:, None]).square_() * h).sum(dim=1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        values = torch.where(is_better[:, None], q, values)
        scales = torch.where(is_better, scale, scales)
    return Int8Weights(values.to(torch.int8), scales * sizes)


def round_float8(weight: Tensor) -> Int8Weights:
    """Rounds a matrix to float8 (E4M3) with one scale a row; the `values` are the bits of the floats.

    Args:
        weight: finite, any float dtype `(N, K)`.
    """
    scales = weight.float().abs().amax(dim=1).clamp(min=_TINY) / FLOAT8_MAX
    bits = (weight.float() / scales[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).view(torch.int8)
    return Int8Weights(bits.masked_fill(bits == -128, 0), scales)  # -0.0 has a byte that no int8 weight has


def round_int4(weight: Tensor, group: int, importance: Tensor | None = None) -> Int4Weights:
    """Rounds a matrix to 4 bits with an integer scale a group and a float scale a row (arXiv 2405.04532).

    The row's scale starts where its widest group gets the largest group scale. Then each group takes the best of
    several group scales, and the row's scale follows by least squares, in turns.

    Args:
        weight: finite, any float dtype `(N, K)`.
        group: inputs that share a group scale; divides K.
        importance: float32 `(K,)`, not negative; None for equal.
    """
    w, sizes = _unit_rows(weight)
    w = w.unflatten(1, (-1, group))  # (N, G, group)
    h = _importance(importance, weight).view(1, -1, group)
    widths = torch.maximum(w.amin(dim=2) / INT4_MIN, w.amax(dim=2) / INT4_MAX).clamp(min=_TINY)  # (N, G)
    scales = widths.amax(dim=1) / LARGEST_SCALE
    for _ in range(NUM_ROUNDS):
        scales = scales.clamp(min=_TINY)
        values, group_scales = _round_groups(w / scales[:, None, None], h, widths / scales[:, None])
        scales = _least_squares(w, values * group_scales[..., None], h)
    return Int4Weights(values.flatten(1).to(torch.int8), group_scales.to(torch.uint8), scales * sizes)


def _unit_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose largest weight is 1, and what they were divided by: squares of errors then stay in range."""
    w = weight.float()
    sizes = w.abs().amax(dim=1).clamp(min=_TINY)
    return w / sizes[:, None], sizes


def _round_groups(w: Tensor, h: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """The best values `(N, G, group)` and group scales `(N, G)` for weights in units of the row's scale."""
    widest = widths.ceil().clamp_(1, LARGEST_SCALE)
    best_error, best = torch.full_like(widest, torch.inf), widest
    for step in range(NUM_GROUP_SCALES):
        scales = (widest - step).clamp_(min=1)
        rounded = _round_to_grid(w, scales).mul_(scales[..., None])
        error = (w - rounded).square_().mul_(h).sum(dim=2)
        is_better = error < best_error
        best_error, best = torch.where(is_better, error, best_error), torch.where(is_better, scales, best)
    return _round_to_grid(w, best), best


def _round_to_grid(w: Tensor, scales: Tensor) -> Tensor:
    """4-bit values `(N, G, group)` for group scales `(N, G)`, such that value times scale is an int8 number."""
    lowest = torch.where(scales <= FULL_RANGE_SCALE, INT4_MIN, -INT4_MAX)
    q = (w / scales[..., None]).round_().clamp_(max=INT4_MAX)
    return torch.maximum(q, lowest[..., None], out=q)


def _least_squares(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    """The scale of each row that brings `q * scale` closest to `w`; 0 for a row that is rounded to nothing."""
    weighted = (q * h).flatten(1)
    fit, size = (weighted * w.flatten(1)).sum(dim=1), (weighted * q.flatten(1)).sum(dim=1)
    return torch.where(size > 0, fit / size.clamp(min=_TINY), 0.0)


def _importance(importance: Tensor | None, weight: Tensor) -> Tensor:
    if importance is None:
        return torch.ones(weight.shape[1])
    return importance / importance.mean().clamp(min=_TINY)
