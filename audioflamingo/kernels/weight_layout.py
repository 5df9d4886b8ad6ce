"""How quantized weights lie in memory. N outputs, K inputs, G = K / group groups of a row.

Sixteen output rows form a block, and four inputs of each lie side by side: 64 bytes feed sixteen outputs with four
inputs each. The last block is filled up with zero rows, K of an int8 layer with zero columns.

int8: byte `[block, K/4, row, 4]` holds `value + 128`.
int4: a block is its group scales `[G, row]`, filled up to a multiple of 64 bytes, then bytes `[K/8, row, 4]`. A byte's
low half is `value + 8` of input `8 p + j`, its high half that of input `8 p + 4 + j`.

The int4 scheme has two levels, as in QServe (arXiv 2405.04532): `value * group scale` is an int8 weight, which the
channel's float scale turns into the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audioflamingo.errors import ArgumentError
from audioflamingo.kernels.host import to_host

BLOCK_ROWS = 16
LINE_BYTES = 64
INT4_GROUPS = (32, 64, 128)
MAX_IN_FEATURES = 131_072  # 127 * 127 * K stays below 2**31

Shape = tuple[int, int]  # (N, K)


def packed_int8_shape(shape: Shape) -> Shape:
    """Shape of the packed uint8 tensor of an int8 layer of `shape` (N, K)."""
    rows, columns = shape
    return -(-rows // BLOCK_ROWS), -(-columns // 4) * LINE_BYTES


def packed_int4_shape(shape: Shape, group: int = 128) -> Shape:
    """Shape of the packed uint8 tensor of an int4 layer of `shape` (N, K).

    Raises:
        ArgumentError: `group` is not 32, 64 or 128, or does not divide K.
    """
    rows, columns = shape
    check_group(columns, group)
    return -(-rows // BLOCK_ROWS), scale_bytes(columns // group) + columns * BLOCK_ROWS // 2


def scale_bytes(num_groups: int) -> int:
    """Bytes of a block's group scales, with those that fill the last line."""
    return -(-num_groups * BLOCK_ROWS // LINE_BYTES) * LINE_BYTES


def pack_int8(values: Tensor) -> Tensor:
    """Lays out int8 weights for the kernels.

    Args:
        values: int8 (N, K), within -127..127.

    Returns:
        uint8 of `packed_int8_shape((N, K))`.

    Raises:
        ArgumentError: another dtype or rank, K above `MAX_IN_FEATURES`, or a value of -128.
    """
    _check_matrix("values", values, torch.int8)
    check_in_features(values.shape[1])
    if bool((values == -128).any()):
        raise ArgumentError("values must lie in -127..127, but hold -128: round the weights symmetrically.")
    blocks, width = packed_int8_shape((values.shape[0], values.shape[1]))
    filled = _fill(values, blocks * BLOCK_ROWS, width // BLOCK_ROWS)
    quads = filled.view(blocks, BLOCK_ROWS, -1, 4).transpose(1, 2)  # (blocks, K/4, row, 4)
    return (quads.reshape(blocks, width).view(torch.uint8)) ^ 0x80


def unpack_int8(packed: Tensor, shape: Shape) -> Tensor:
    """Inverse of `pack_int8`: int8 (N, K)."""
    check_packed(packed, packed_int8_shape(shape))
    quads = (packed ^ 0x80).view(torch.int8).view(packed.shape[0], -1, BLOCK_ROWS, 4)
    return quads.transpose(1, 2).reshape(packed.shape[0] * BLOCK_ROWS, -1)[: shape[0], : shape[1]]


def pack_int4(values: Tensor, group_scales: Tensor, group: int = 128) -> Tensor:
    """Lays out 4-bit weights and their integer group scales for the kernels.

    Args:
        values: int8 (N, K), within -8..7.
        group_scales: uint8 (N, K / group); `value * scale` must lie in -127..127.
        group: inputs that share a scale: 32, 64 or 128.

    Returns:
        uint8 of `packed_int4_shape((N, K), group)`.

    Raises:
        ArgumentError: another dtype or shape, a group that does not divide K, or numbers out of range.
    """
    _check_matrix("values", values, torch.int8)
    _check_matrix("group_scales", group_scales, torch.uint8)
    rows, columns = values.shape
    blocks, width = packed_int4_shape((rows, columns), group)
    _check_int4_range(values, group_scales, group)
    filled = _fill(values, blocks * BLOCK_ROWS, columns)
    halves = (filled + 8).view(torch.uint8).view(blocks, BLOCK_ROWS, columns // 8, 2, 4)
    halves = halves.permute(3, 0, 2, 1, 4)  # (half, blocks, K/8, row, 4)
    nibbles = (halves[0] | (halves[1] << 4)).reshape(blocks, -1)
    scales = _fill(group_scales, blocks * BLOCK_ROWS, columns // group)
    scales = scales.view(blocks, BLOCK_ROWS, -1).transpose(1, 2).reshape(blocks, -1)
    return torch.cat([_fill(scales, blocks, width - nibbles.shape[1]), nibbles], dim=1)


def unpack_int4(packed: Tensor, shape: Shape, group: int = 128) -> Tensor:
    """The int8 weights `value * group scale` (N, K) of a packed int4 layer."""
    check_packed(packed, packed_int4_shape(shape, group))
    nibbles, scales = _int4_views(packed, shape[1], group)
    rows = len(packed) * BLOCK_ROWS
    values = _int4_weights(
        nibbles.transpose(1, 2).reshape(rows, -1, 4), scales.transpose(1, 2).reshape(rows, -1)
    )
    return values[: shape[0]]


def gather_int8(
    indices: Tensor, packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of a packed int8 table, as an embedding looks them up.

    Args:
        indices: integers of any shape, within 0..N-1.
        packed: uint8 of `packed_int8_shape(shape)`.
        scales: float32 (N,), per row.
        shape: (N, K) of the table.
        dtype: of the result.

    Returns:
        `dtype` (..., K): int8 value times scale in float32, then rounded to `dtype`.
    """
    check_packed(packed, packed_int8_shape(shape))
    flat = indices.reshape(-1)
    blocks = packed.view(len(packed), -1, BLOCK_ROWS, 4)
    # Row by row: indexing all at once reads the lines of a block out of order, a hundred times slower.
    rows = [blocks[index // BLOCK_ROWS, :, index % BLOCK_ROWS] for index in to_host(flat)]
    quads = torch.stack(rows) if rows else blocks.new_empty(0, blocks.shape[1], 4)
    values = (quads ^ 0x80).view(torch.int8).view(len(flat), quads.shape[1] * 4)[:, : shape[1]]
    return _scaled_rows(values, scales, flat, dtype).view(*indices.shape, shape[1])


def check_group(columns: int, group: int) -> None:
    """Raises `ArgumentError` unless `group` is known and divides `columns`."""
    check_in_features(columns)
    if group not in INT4_GROUPS:
        raise ArgumentError(f"group={group} is not supported: use one of {INT4_GROUPS}.")
    if columns % group:
        raise ArgumentError(
            f"group={group} does not divide the layer's {columns} inputs: use a smaller group or int8."
        )


def check_in_features(columns: int) -> None:
    """Raises `ArgumentError` where a sum over `columns` products could leave 32 bits."""
    if not 0 < columns <= MAX_IN_FEATURES:
        raise ArgumentError(f"a quantized layer takes 1 to {MAX_IN_FEATURES} inputs, got {columns}.")


def check_packed(packed: Tensor, shape: Shape) -> None:
    """Raises `ArgumentError` unless `packed` is a contiguous uint8 tensor of `shape`."""
    if packed.dtype != torch.uint8 or packed.shape != shape or not packed.is_contiguous():
        raise ArgumentError(
            f"packed must be a contiguous uint8 tensor of shape {shape}, got {packed.dtype} "
            f"{tuple(packed.shape)}: pass what pack_int8 or pack_int4 returned for this layer."
        )


def _int4_views(packed: Tensor, columns: int, group: int) -> tuple[Tensor, Tensor]:
    """Views of packed blocks: bytes (blocks, K/8, row, 4) and group scales (blocks, G, row)."""
    num_groups = columns // group
    scales = packed[:, : num_groups * BLOCK_ROWS].view(len(packed), num_groups, BLOCK_ROWS)
    return packed[:, scale_bytes(num_groups) :].view(len(packed), columns // 8, BLOCK_ROWS, 4), scales


def _int4_weights(nibbles: Tensor, scales: Tensor) -> Tensor:
    """int8 `value * scale` (rows, K) of bytes (rows, K/8, 4) and scales (rows, G)."""
    values = torch.stack([nibbles & 0x0F, nibbles >> 4], dim=2).view(torch.int8) - 8  # (rows, K/8, 2, 4)
    rows, num_groups = scales.shape
    grouped = values.view(rows, num_groups, nibbles.shape[1] * 8 // num_groups)
    return (grouped * scales.view(torch.int8)[..., None]).view(rows, nibbles.shape[1] * 8)


def _scaled_rows(values: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return (values.float() * scales[rows, None]).to(dtype)


def _fill(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zero rows and columns appended."""
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def _check_matrix(name: str, matrix: Tensor, dtype: torch.dtype) -> None:
    if matrix.dtype != dtype or matrix.ndim != 2:
        raise ArgumentError(
            f"{name} must be a matrix of {dtype}, got {matrix.dtype} of shape {tuple(matrix.shape)}."
        )


def _check_int4_range(values: Tensor, group_scales: Tensor, group: int) -> None:
    rows, columns = values.shape
    if tuple(group_scales.shape) != (rows, columns // group):
        raise ArgumentError(
            f"group_scales must have shape {(rows, columns // group)}, got {tuple(group_scales.shape)}."
        )
    low, high = values.view(rows, -1, group).aminmax(dim=2)
    largest = torch.maximum(-low.int(), high.int())
    if int(low.min()) < -8 or int(high.max()) > 7:
        raise ArgumentError(f"4-bit values must lie in -8..7, got {int(low.min())}..{int(high.max())}.")
    if int((largest * group_scales.int()).max()) > 127 or int(group_scales.max()) > 127:
        raise ArgumentError("value * group scale must lie in -127..127, and a group scale in 0..127.")
