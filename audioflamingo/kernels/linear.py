"""The linear layers: arguments are checked here, before any pointer reaches a kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.kernels import halves, native, reference
from audioflamingo.kernels.weight_layout import Shape, check_packed, packed_int4_shape, packed_int8_shape

INPUT_DTYPES = (torch.float32, torch.bfloat16)  # in the order of DType in kernels.h
MAX_BF16_ROWS = 16
HALF_COLUMNS = 32  # inputs of a layer with float16 weights are a multiple of these
SLOW_PASSES = 4  # where bfloat16 is slow, reading the weights so many times is faster than F.linear


def backend() -> str:
    """Which code runs: "avx512-bf16", "avx512-vnni", "avx2", "generic" or "torch".

    Raises:
        ArgumentError: `AF3_KERNELS` names a backend that does not exist or does not run here.
    """
    return native.active()


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
        (..., N) of x's dtype. Asking for its gradient is an error.

    Raises:
        ArgumentError: a dtype or shape that does not fit.
        DeviceError: a tensor that is not on the CPU.
    """
    check_packed(packed, packed_int8_shape(shape))
    bias = _checked(x, packed, scales, bias, shape)
    if native.active() == native.TORCH:
        rows = x.detach().reshape(x.numel() // shape[1], shape[1])
        out = reference.linear_int8(rows, packed, scales, bias, shape).view(*x.shape[:-1], shape[0])
    else:
        out = _run(x, packed, scales, bias, shape, group=0)
    return _WithoutGradient.apply(x, out) if x.requires_grad and torch.is_grad_enabled() else out  # type: ignore[no-untyped-call]


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
        (..., N) of x's dtype. Asking for its gradient is an error.

    Raises:
        ArgumentError: a dtype or shape that does not fit, or a group that does not divide K.
        DeviceError: a tensor that is not on the CPU.
    """
    check_packed(packed, packed_int4_shape(shape, group))
    bias = _checked(x, packed, scales, bias, shape)
    if native.active() == native.TORCH:
        rows = x.detach().reshape(x.numel() // shape[1], shape[1])
        out = reference.linear_int4(rows, packed, scales, bias, shape, group).view(*x.shape[:-1], shape[0])
    else:
        out = _run(x, packed, scales, bias, shape, group)
    return _WithoutGradient.apply(x, out) if x.requires_grad and torch.is_grad_enabled() else out  # type: ignore[no-untyped-call]


def linear_halves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in bfloat16 or float16 that reads the weights once, at memory speed, for 1 to 16 rows.

    Sums are float32 and include the bias; a row's result does not depend on the rows beside it while there are at most
    16. More rows run `F.linear`, as do calls that need a gradient; on a CPU that is slow in bfloat16, up to 64 take
    several turns of 16, and yet more are multiplied in float32. Weights in float16 take float16 rows, or float32 ones,
    as if they were widened first, which for 1 to 16 rows they are not.

    Args:
        x: bfloat16 or float16 (..., K) on the CPU, or float32.
        weight: in the dtype of x (N, K), contiguous; or float16 beside float32 rows.
        bias: (N,) in the dtype of x, or None.

    Returns:
        (..., N) in the dtype of x.
    """
    num_rows = x.numel() // max(x.shape[-1], 1)
    if weight.dtype == torch.float16 and x.dtype in (torch.float16, torch.float32):
        return _linear_half(x, weight, bias, num_rows)
    return _linear_bf16(x, weight, bias, num_rows)


def _linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int) -> Tensor:
    if num_rows == 0 or not _fits_bf16(x, weight, bias):
        return F.linear(x, weight, bias)
    backend = native.active()
    is_quick = halves.slowness() < 1
    if backend in _NO_BF16 or num_rows > MAX_BF16_ROWS * (1 if is_quick else SLOW_PASSES):
        return (halves.linear_widened if halves.is_slow(x, num_rows) else F.linear)(x, weight, bias)
    if not is_quick and backend == native.LEVELS[-1]:
        backend = native.LEVELS[-2]  # which multiplies in float32
    rows = x.reshape(num_rows, x.shape[-1]).contiguous()
    out = torch.empty(num_rows, len(weight), dtype=torch.bfloat16)
    step = math.ceil(num_rows / math.ceil(num_rows / MAX_BF16_ROWS))
    for some, some_out in zip(rows.split(step), out.split(step), strict=True):
        native.linear_bf16(
            backend,
            torch.get_num_threads(),
            (len(some), *weight.shape),
            (
                some.data_ptr(),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                some_out.data_ptr(),
            ),
        )
    return out.view(*x.shape[:-1], len(weight))


def _linear_half(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int) -> Tensor:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() or not all(t.is_cpu for t in tensors):
        return F.linear(x, weight.to(x.dtype), bias)
    is_small = 0 < num_rows <= MAX_BF16_ROWS and weight.shape[1] % HALF_COLUMNS == 0
    if not (is_small and weight.is_contiguous() and native.has_step()):
        way = halves.linear_widened if halves.is_slow(x, num_rows) else F.linear
        return way(x, weight.to(x.dtype), bias)
    rows, shift = x.float().contiguous(), None if bias is None else bias.float().contiguous()
    out = rows.new_empty(*x.shape[:-1], len(weight))
    pointers = rows.data_ptr(), weight.data_ptr(), None if shift is None else shift.data_ptr(), out.data_ptr()
    native.linear_half(torch.get_num_threads(), (num_rows, *weight.shape), pointers)
    return out.to(x.dtype)


_NO_BF16 = (native.TORCH, native.LEVELS[0])


def _fits_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
        and weight.ndim == 2
        and weight.shape[1] == x.shape[-1]
        and weight.is_contiguous()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _run(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape, group: int) -> Tensor:
    num_out, num_in = shape
    out = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype)
    if x.numel():
        x, scales = x.contiguous(), scales.contiguous()
        native.linear(
            native.active(),
            torch.get_num_threads(),
            INPUT_DTYPES.index(x.dtype),
            group,
            (x.numel() // num_in, num_out, num_in),
            (
                x.data_ptr(),
                packed.data_ptr(),
                scales.data_ptr(),
                None if bias is None else bias.data_ptr(),
                out.data_ptr(),
            ),
        )
    return out


class _WithoutGradient(torch.autograd.Function):
    """The identity on `out`; a backward pass through it is an error in place of a silent zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        raise ArgumentError("quantized layers have no gradient: train the model in bfloat16 or float32.")


def _checked(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, shape: Shape) -> Tensor | None:
    """The bias in float32, once everything fits `shape`. Runs for every layer of every token, so it is kept cheap."""
    num_out, num_in = shape
    if x.dtype not in INPUT_DTYPES or x.ndim == 0 or x.shape[-1] != num_in:
        raise ArgumentError(
            f"x must be float32 or bfloat16 with {num_in} features, got {x.dtype} of shape {tuple(x.shape)}."
        )
    if scales.dtype != torch.float32 or scales.shape != (num_out,):
        raise ArgumentError(
            f"scales must be float32 of shape ({num_out},), got {scales.dtype} {tuple(scales.shape)}."
        )
    if bias is not None:
        if bias.dtype not in (torch.float32, x.dtype) or bias.shape != (num_out,):
            raise ArgumentError(
                f"bias must be float32 or {x.dtype} of shape ({num_out},), got {bias.dtype} {tuple(bias.shape)}."
            )
        bias = bias.detach().float().contiguous()
    if not (x.is_cpu and packed.is_cpu and scales.is_cpu and (bias is None or bias.is_cpu)):
        devices = {tensor.device for tensor in (x, packed, scales, bias) if tensor is not None}
        raise DeviceError(
            f"quantized layers run on the CPU, but x, packed, scales and bias are on {devices}: move them there."
        )
    return bias
