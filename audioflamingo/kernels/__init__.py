"""Linear layers with 8-bit, 4-bit and bfloat16 weights on a CPU; `gpu` uses the same weights on a GPU.

Weights are packed once (`pack_int8`, `pack_int4`); the packed bytes are what the kernels read, so a packed tensor can
be saved, mapped from a file and used as it is. Activations are quantized per row while the layer runs. Integer sums
are exact: every backend gives the same bits, and a row's result never depends on the rows beside it.

`backend()` says which code runs. The environment variable `AF3_KERNELS` forces one: `torch`, `generic`, `avx2`,
`avx512`. It is read once, when the first layer runs.
"""

from audioflamingo.kernels.linear import backend, linear_halves, linear_int4, linear_int8
from audioflamingo.kernels.reference import quantize_rows
from audioflamingo.kernels.weight_layout import (
    BLOCK_ROWS,
    INT4_GROUPS,
    MAX_IN_FEATURES,
    gather_int8,
    pack_int4,
    pack_int8,
    packed_int4_shape,
    packed_int8_shape,
    unpack_int4,
    unpack_int8,
)

__all__ = [
    "BLOCK_ROWS",
    "INT4_GROUPS",
    "MAX_IN_FEATURES",
    "backend",
    "gather_int8",
    "linear_halves",
    "linear_int4",
    "linear_int8",
    "pack_int4",
    "pack_int8",
    "packed_int4_shape",
    "packed_int8_shape",
    "quantize_rows",
    "unpack_int4",
    "unpack_int8",
]
