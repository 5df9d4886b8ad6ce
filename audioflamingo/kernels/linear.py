"""The linear layers: arguments are checked here, before any pointer reaches a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.kernels import reference
from audioflamingo.kernels.layout import Shape, check_packed, packed_int4_shape, packed_int8_shape

INPUT_DTYPES = (torch.float32, torch.bfloat16)


def backend() -> str:
    """Which code runs: "avx512-bf16", "avx512-vnni", "avx2", "generic" or "torch"."""
    return "torch"


def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """A linear layer with int8 weights and activations that are rounded to int8 row by row.

    The sum over K is an exact integer; `sum * (row scale * channel scale) + bias` is float32, then rounded to x's
    dtype.

    Args:
        x: float32 or bfloat16 (..., K) on the CPU.
        packed: `pack_int8` of the weights (N, K).
        scales: float32 (N,), per output channel.
        bias: float32 or x's dtype (N,), or None.
        shape: (N, K).

    Returns:
        (..., N) of x's dtype. It carries no gradient.

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        DeviceError: a tensor that is not on the CPU.
    """
    check_packed(packed, packed_int8_shape(shape))
    rows, bias = _checked(x, packed, scales, bias, shape)
    return reference.linear_int8(rows, packed, scales, bias, shape).view(*x.shape[:-1], shape[0])


def linear_int4(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape, group: int = 128
) -> Tensor:
    """A linear layer with 4-bit weights, integer group scales and activations rounded to int8 row by row.

    As `linear_int8`, with the int8 weight `value * group scale`.

    Args:
        x: float32 or bfloat16 (..., K) on the CPU.
        packed: `pack_int4` of the weights (N, K) and their group scales.
        scales: float32 (N,), per output channel.
        bias: float32 or x's dtype (N,), or None.
        shape: (N, K).
        group: inputs that share an integer scale.

    Returns:
        (..., N) of x's dtype. It carries no gradient.

    Raises:
        ArgumentError: a dtype or shape that does not fit, or a group that does not divide K.
        DeviceError: a tensor that is not on the CPU.
    """
    check_packed(packed, packed_int4_shape(shape, group))
    rows, bias = _checked(x, packed, scales, bias, shape)
    return reference.linear_int4(rows, packed, scales, bias, shape, group).view(*x.shape[:-1], shape[0])


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in bfloat16 that reads the weights once, at memory speed, for 1 to 16 rows.

    Sums are float32 and include the bias; a row's result does not depend on the rows beside it while there are at most
    16. More rows, and calls that need a gradient, run `F.linear`.

    Args:
        x: bfloat16 (..., K) on the CPU.
        weight: bfloat16 (N, K).
        bias: bfloat16 (N,), or None.

    Returns:
        bfloat16 (..., N).
    """
    return F.linear(x, weight, bias)


def _checked(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """`x` as contiguous rows (M, K) and the bias in float32, once everything fits `shape`."""
    num_out, num_in = shape
    if x.dtype not in INPUT_DTYPES or x.ndim == 0 or x.shape[-1] != num_in:
        raise ArgumentError(
            f"x must be float32 or bfloat16 with {num_in} features, got {x.dtype} of shape {tuple(x.shape)}."
        )
    if scales.dtype != torch.float32 or tuple(scales.shape) != (num_out,):
        raise ArgumentError(
            f"scales must be float32 of shape ({num_out},), got {scales.dtype} {tuple(scales.shape)}."
        )
    if bias is not None:
        if bias.dtype not in (torch.float32, x.dtype) or tuple(bias.shape) != (num_out,):
            raise ArgumentError(
                f"bias must be float32 or {x.dtype} of shape ({num_out},), got {bias.dtype} {tuple(bias.shape)}."
            )
        bias = bias.float().contiguous()
    for name, tensor in (("x", x), ("packed", packed), ("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.device.type != "cpu":
            raise DeviceError(
                f"{name} is on {tensor.device}, but quantized layers run on the CPU: move it there."
            )
    return x.detach().reshape(-1, num_in).contiguous(), bias
