"""Runs the GPU's kernels in Triton's interpreter, on the CPU, and prints how far each is from what it should give.

A line for each case: its kind, its relative error, and how large that may be.
"""

from __future__ import annotations

import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from torch import Tensor
from torch.nn import functional as F

from audioflamingo import kernels
from audioflamingo.kernels import triton_kernels as gpu
from audioflamingo.network.qwen2 import rotary_embedding, rotate

TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 6e-3,
}  # the interpreter cuts bfloat16 off, it does not round
# Outputs and inputs that blocks of 16 rows, words of four inputs and a program's share do not divide.
SHAPES = ((40, 36), (33, 64), (48, 384), (16, 1100))
NUM_ROWS = (1, 3, 17, 40)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7)).to(torch.int8)


def packed_weights(shape: tuple[int, int], group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights, their scales, and the matrix `(N, K)` that they stand for."""
    scales = random(shape[0]).abs() + 0.1
    if group is None:
        values = integers(-127, 128, *shape)
        return kernels.pack_int8(values), scales, values.float() * scales[:, None]
    values = integers(-8, 8, *shape)
    group_scales = integers(0, 16, shape[0], shape[1] // group).view(torch.uint8)
    packed = kernels.pack_int4(values, group_scales, group)
    weights = (values.view(shape[0], -1, group) * group_scales[..., None].float()).flatten(1)
    return packed, scales, weights * scales[:, None]


def float8_weights(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of float8, every finite one among them: subnormals, zeros of either sign are one."""
    scales = random(shape[0]).abs() + 0.1
    bits = torch.arange(math.prod(shape)).remainder(256).to(torch.uint8).view(torch.int8).view(shape)
    values = bits.masked_fill((bits == 127) | (bits == -1) | (bits == -128), 0)  # NaN; -0.0
    weights = values.view(torch.float8_e4m3fn).float() * scales[:, None]
    return kernels.pack_int8(values), scales, weights


def report(kind: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    print(kind.replace(" ", "_"), error, tolerance)


def check_packed(shape: tuple[int, int], group: int | None, is_float: bool = False) -> None:
    packed, scales, weights = float8_weights(shape) if is_float else packed_weights(shape, group)
    unpacked = gpu.unpack(packed, scales, shape, group, torch.float32, is_float)
    report(f"unpack {shape} {group} {is_float}", unpacked, weights, 0)
    for dtype, tolerance in TOLERANCE.items():
        for num_rows in NUM_ROWS:
            x = random(num_rows, shape[1], seed=1, dtype=dtype)
            bias = random(shape[0], seed=2, dtype=dtype) if num_rows != 3 else None
            found = gpu.packed_linear(x, packed, scales, bias, shape, group, is_float)
            assert found.dtype == dtype
            expected = F.linear(x.double(), weights.double(), None if bias is None else bias.double())
            report(f"packed {shape} {group} {is_float} {num_rows} {dtype}", found, expected, tolerance)


def check_small(dtype: torch.dtype, tolerance: float) -> None:
    for shape in SHAPES:
        x, weight = random(1, shape[1], dtype=dtype), random(*shape, dtype=dtype)
        for bias in (None, random(shape[0], dtype=dtype)):
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            report(f"row {shape} {dtype}", gpu.float_linear(x, weight, bias), expected, tolerance)
    query, key = random(3, 6, 16, dtype=dtype), random(3, 2, 16, seed=1, dtype=dtype)
    rotary = rotary_embedding(torch.tensor([0, 5, 1000]), 16, 1e6, dtype)
    exact = rotary[0].double(), rotary[1].double()
    for found, given in zip(gpu.rotate_both(query, key, rotary), (query, key), strict=True):
        report(f"rotate {dtype}", found, rotate(given.double(), exact), tolerance)
    gate, up = random(3, 50, dtype=dtype) * 4, random(3, 50, seed=1, dtype=dtype)
    report(f"silu {dtype}", gpu.silu_times(gate, up), F.silu(gate.double()) * up.double(), tolerance)


if __name__ == "__main__":
    for size in SHAPES:
        for group_size in (None, 32, 64, 128):
            if group_size is None or size[1] % group_size == 0:
                check_packed(size, group_size)
        check_packed(size, None, is_float=True)
    for kind_of_number, most in TOLERANCE.items():
        check_small(kind_of_number, most)
