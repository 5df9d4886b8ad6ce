"""The matrix of a layer, rounded and laid out as the kernels read it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from audioflamingo.errors import ArgumentError
from audioflamingo.kernels import (
    BLOCK_ROWS,
    pack_int4,
    pack_int8,
    packed_int4_shape,
    packed_int8_shape,
)
from audioflamingo.quantization.calibration import LayerInputs
from audioflamingo.quantization.rounding import round_float8, round_int4, round_int8
from audioflamingo.quantization.schemes import LayerFormat
from audioflamingo.quantization.smoothing import choose_factors

SCALES = "scales"
SMOOTHING = "smoothing"
CHUNK_ELEMENTS = 1 << 19  # weights that are rounded at one time: what fits into the caches


def packed_shape(shape: tuple[int, int], format_: LayerFormat) -> tuple[int, int]:
    """Shape of the packed uint8 tensor of weights `(N, K)`."""
    return packed_int8_shape(shape) if format_.group is None else packed_int4_shape(shape, format_.group)


def pack_layer(
    weight: Tensor, format_: LayerFormat, name: str, inputs: LayerInputs | None = None
) -> dict[str, Tensor]:
    """Rounds and packs the matrix of a layer, a few rows at a time.

    Args:
        weight: any float dtype `(N, K)`, on the CPU.
        format_: how.
        name: of the layer, for messages.
        inputs: what the layer gets; None if that was not measured.

    Returns:
        The tensors of the quantized layer, but for its bias, by their names in it: the packed integers, uint8 of
        `packed_shape`; `"scales"`, float32 `(N,)`; if it is smoothed `"smoothing"`, float32 `(K,)`.

    Raises:
        ArgumentError: weights that are NaN or infinite.
    """
    num_rows, num_columns = weight.shape
    tensors = {
        format_.tensor_name: torch.empty(packed_shape((num_rows, num_columns), format_), dtype=torch.uint8),
        SCALES: torch.empty(num_rows),
    }
    packed, scales = tensors.values()
    importance = None if inputs is None else inputs.mean_squares
    factors = torch.ones(num_columns)
    if format_.is_smoothed:
        tensors[SMOOTHING] = factors
        if inputs is not None and importance is not None:
            factors = choose_factors(weight, inputs, partial(_rounded_rows, format_=format_))
            importance = importance * factors.square()
            tensors[SMOOTHING] = factors
    blocks = max(1, CHUNK_ELEMENTS // (num_columns * BLOCK_ROWS))
    for block in range(0, len(packed), blocks):
        rows = slice(block * BLOCK_ROWS, (block + blocks) * BLOCK_ROWS)
        chunk = weight[rows].float()
        if not chunk.isfinite().all():
            raise ArgumentError(f"the weights of {name} hold NaN or infinity; they cannot be quantized.")
        packed[block : block + blocks], scales[rows] = _pack_rows(chunk / factors, importance, format_)
    return tensors


def _pack_rows(rows: Tensor, importance: Tensor | None, format_: LayerFormat) -> tuple[Tensor, Tensor]:
    if format_.group is None:
        int8 = round_float8(rows) if format_.is_float else round_int8(rows, importance)
        return pack_int8(int8.values), int8.scales
    int4 = round_int4(rows, format_.group, importance)
    return pack_int4(int4.values, int4.group_scales, format_.group), int4.scales


def _rounded_rows(rows: Tensor, importance: Tensor, format_: LayerFormat) -> Tensor:
    """What the rounded weights stand for, `(n, K)`."""
    if format_.group is None:
        int8 = round_int8(rows, importance)
        return int8.values * int8.scales[:, None]
    int4 = round_int4(rows, format_.group, importance)
    return int4.values * int4.group_scales.repeat_interleave(format_.group, dim=1) * int4.scales[:, None]
