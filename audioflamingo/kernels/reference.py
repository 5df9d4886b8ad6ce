"""The kernels' arithmetic in plain torch: what every backend gives to the bit, and the fallback."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from audioflamingo.kernels.weight_layout import BLOCK_ROWS, Shape, unpack_int4, unpack_int8

# 1024 * 127 * 127 < 2**24: a float32 product over so many int8 columns is exact in any order.
_EXACT_COLUMNS = 1024
_SLICE_BLOCKS = 128  # 2048 output rows are unpacked at a time


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to int8, symmetrically, to nearest even.

    Args:
        x: floating point (..., K).

    Returns:
        int8 (..., K) within -127..127, and float32 scales (...): `max |x| / 127`. A row whose scale would be below
        float32's smallest normal number has scale 0 and values 0. A row with a NaN or an infinity has scale NaN and
        values 0, so that its products are NaN.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1) / 127
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    usable = scales > 0
    divisors = torch.where(usable, scales, 1.0)[..., None]
    values = torch.where(usable[..., None], x / divisors, 0.0)
    return values.round().clamp(-127, 127).to(torch.int8), scales


def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """`kernels.linear_int8` for `x` (M, K): (M, N)."""

    def unpack(blocks: Tensor) -> Tensor:
        return unpack_int8(blocks, (len(blocks) * BLOCK_ROWS, shape[1]))

    return _linear(x, packed, unpack, scales, bias)


def linear_int4(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape, group: int
) -> Tensor:
    """`kernels.linear_int4` for `x` (M, K): (M, N)."""

    def unpack(blocks: Tensor) -> Tensor:
        return unpack_int4(blocks, (len(blocks) * BLOCK_ROWS, shape[1]), group)

    return _linear(x, packed, unpack, scales, bias)


def _linear(
    x: Tensor, packed: Tensor, unpack: Callable[[Tensor], Tensor], scales: Tensor, bias: Tensor | None
) -> Tensor:
    values, row_scales = quantize_rows(x)
    products = [_integer_product(values, unpack(blocks)) for blocks in packed.split(_SLICE_BLOCKS)]
    sums = torch.cat(products, dim=1)[:, : len(scales)].float()  # (M, N)
    out = sums * (row_scales[:, None] * scales)
    return (out if bias is None else out + bias).to(x.dtype)


def _integer_product(values: Tensor, weights: Tensor) -> Tensor:
    """Exact int32 product of int8 (M, K) and int8 (N, K)."""
    total = torch.zeros(len(values), len(weights), dtype=torch.int32)
    for left, right in zip(
        values.split(_EXACT_COLUMNS, dim=1), weights.split(_EXACT_COLUMNS, dim=1), strict=True
    ):
        total += (left.float() @ right.float().T).int()
    return total
