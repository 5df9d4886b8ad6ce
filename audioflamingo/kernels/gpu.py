"""What a GPU runs by kernels of this package: packed weights always, the small work of a decode step when recorded.

Outside of a recorded step the small kernels are left to torch: starting one from Python takes longer than it saves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.kernels.weight_layout import BLOCK_ROWS, Shape

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT8_STEP = 16  # of which products of float8 take multiples
MIN_ROW_SCALE = 1e-12  # of a row that is all zeros
MIN_FEATURES = 512  # of a layer whose rows are worth a kernel of their own
_is_step: ContextVar[bool] = ContextVar("is_step", default=False)


@cache
def has_triton() -> bool:
    """Whether the package is installed that compiles the kernels; torch for CUDA brings it on Linux."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def step_kernels() -> Iterator[None]:
    """A context in which the small work of a decode step runs by few kernels."""
    token = _is_step.set(has_triton())
    try:
        yield
    finally:
        _is_step.reset(token)


def in_step(x: Tensor) -> bool:
    """Whether `step_kernels` apply to what is computed from a tensor."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _is_step.get()


def takes_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_row` does the work of a linear layer in a decode step."""
    return (
        x.numel() == x.shape[-1] >= MIN_FEATURES
        and in_step(x)
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and (bias is None or bias.dtype == x.dtype)
    )


def linear_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a single row, at the speed at which the weights are read."""
    out: Tensor = _kernels().float_linear(x.view(1, -1), weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def rotate_both(query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries `(N, H, E)` and keys `(N, K, E)` turned by their positions' angles."""
    turned: tuple[Tensor, Tensor] = _kernels().rotate_both(query, key, rotary)
    return turned


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    out: Tensor = _kernels().silu_times(gate, up)
    return out


@cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether a GPU has products of float8 with a scale for each row: compute capability 9.0 or more."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def linear_packed(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    shape: Shape,
    group: int | None,
    is_float: bool = False,
) -> Tensor:
    """A linear layer with packed weights, which are not rounded further; activations stay as they are.

    Few rows multiply the packed weights as they lie. For more, as of a prompt or a clip, the weights are unpacked to
    the dtype of `x` first, which those who are many share. Many bfloat16 rows beside float8 weights are themselves
    rounded to float8, row by row, where the GPU multiplies in it.

    Args:
        x: bfloat16, float16 or float32 `(..., K)` on a GPU.
        packed: as `pack_int8` or `pack_int4` make it.
        scales: float32 `(N,)`.
        bias: `(N,)`, or None.
        shape: (N, K).
        group: inputs that share a group scale; None for 8 bits.
        is_float: the 8 bits are a float8.

    Returns:
        `(..., N)` in the dtype of `x`.

    Raises:
        ArgumentError: a dtype that does not fit.
        DeviceError: triton is not installed.
    """
    if x.dtype not in FLOAT_DTYPES or x.shape[-1] != shape[1]:
        raise ArgumentError(
            f"x must be one of {FLOAT_DTYPES} with {shape[1]} features, got {x.dtype} {tuple(x.shape)}."
        )
    rows = x.reshape(-1, shape[1])
    out: Tensor = _packed_product()(rows, packed, scales, bias, list(shape), group or 0, is_float)
    return out.view(*x.shape[:-1], shape[0])


def fits_float8_product(x: Tensor, shape: Shape) -> bool:
    """Whether `float8_product` takes such rows and weights."""
    return x.dtype == torch.bfloat16 and shape[0] % FLOAT8_STEP == 0 and shape[1] % FLOAT8_STEP == 0


def float8_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weights are float8 and whose rows are rounded to it, each by its largest value.

    Args:
        x: bfloat16 `(M, K)`.
        weight: float8 `(N, K)`.
        scales: float32 `(N,)`.
        bias: bfloat16 `(N,)`, or None.

    Returns:
        bfloat16 `(M, N)`.
    """
    largest = torch.finfo(weight.dtype).max
    row_scales = x.abs().amax(dim=1, keepdim=True).float().clamp(min=MIN_ROW_SCALE) / largest
    rows = (x.float() / row_scales).clamp(-largest, largest).to(weight.dtype)
    out: Tensor = torch._scaled_mm(
        rows, weight.t(), row_scales, scales[None], bias=bias, out_dtype=torch.bfloat16
    )
    return out


def gather_packed(
    indices: Tensor, packed: Tensor, scales: Tensor, shape: Shape, dtype: torch.dtype
) -> Tensor:
    """`kernels.gather_int8` without a value that reaches the host."""
    flat = indices.reshape(-1)
    blocks = packed.view(len(packed), -1, BLOCK_ROWS, 4)
    quads = blocks[flat // BLOCK_ROWS, :, flat % BLOCK_ROWS]  # (n, K / 4, 4)
    values = (quads ^ 0x80).view(torch.int8).flatten(1)[:, : shape[1]]
    return (values.float() * scales[flat, None]).to(dtype).view(*indices.shape, shape[1])


def check_triton() -> None:
    """Raises `DeviceError` where packed weights cannot be used on a GPU."""
    if not has_triton():
        raise DeviceError(
            "a quantized model runs on a GPU by kernels that the package triton compiles, and it is not installed: "
            "pip install triton, or load the model on the CPU."
        )


def _kernels() -> Any:
    check_triton()
    from audioflamingo.kernels import triton_kernels

    return triton_kernels


@cache
def _packed_product() -> Any:
    """The product as an operation of torch's, so that compilers and tensors without data know its result."""

    @torch.library.custom_op("audioflamingo::packed_linear", mutates_args=(), device_types="cuda")
    def linear(
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        shape: list[int],
        group: int,
        is_float: bool,
    ) -> Tensor:
        kernels, size = _kernels(), (shape[0], shape[1])
        with torch.cuda.device(x.device):  # where triton starts kernels
            if len(x) <= kernels.MAX_FEW_ROWS:
                out: Tensor = kernels.packed_linear(x, packed, scales, bias, size, group or None, is_float)
                return out
            bias = None if bias is None else bias.to(x.dtype)
            if is_float and fits_float8_product(x, size) and multiplies_float8(x.device):
                ones = torch.ones_like(scales)
                weight = kernels.unpack(packed, ones, size, None, torch.float8_e4m3fn, is_float)
                return float8_product(x, weight, scales, bias)
            weight = kernels.unpack(packed, scales, size, group or None, x.dtype, is_float)
        return F.linear(x, weight, bias)

    @linear.register_fake
    def _(
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        shape: list[int],
        group: int,
        is_float: bool,
    ) -> Tensor:
        return x.new_empty(len(x), shape[0])

    return linear
