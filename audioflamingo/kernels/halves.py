"""bfloat16 and float16 on a CPU: how fast they multiply, and the way round through float32 where that is faster.

Processors with AMX, and AMD's with AVX-512 BF16, multiply bfloat16 matrices about twice as fast as float32 ones.
Intel's with AVX-512 BF16 alone take twice as long for them, and processors without either emulate them, fifty times
slower. float16 is quick where there is AVX-512 FP16. The sums are float32 in every case, so widening the factors first
changes nothing but the time.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn import functional as F

HALVES = (torch.bfloat16, torch.float16)
WIDENING_ROWS = 40  # widening a weight matrix takes as long as multiplying so many rows with it in float32
WIDENED_BYTES = 1 << 25  # of float32 weights at once
EMULATED = 8.0  # so many times as slow is emulated: small products tell, large ones would take a second to


def slowness(dtype: torch.dtype = torch.bfloat16) -> float:
    """Time of a product in bfloat16 or float16 as a multiple of its time in float32, measured once on this CPU."""
    return _slowness(dtype)


@functools.cache
def _slowness(dtype: torch.dtype) -> float:
    ratio = _time_ratio(dtype, 128)
    return ratio if ratio > EMULATED else _time_ratio(dtype, 512)


def _time_ratio(half: torch.dtype, size: int) -> float:
    x = torch.ones(size, size)
    seconds = dict.fromkeys((torch.float32, half), float("inf"))
    for _ in range(4):  # the first round warms up
        for dtype in seconds:
            factor = x.to(dtype)
            start = time.perf_counter()
            factor @ factor
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[half] / seconds[torch.float32]


def widening_pays(num_rows: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether so many rows times a matrix of halves are faster in float32, the widening of the matrix included."""
    return num_rows * (slowness(dtype) - 1) > WIDENING_ROWS


def is_slow(x: Tensor, num_rows: int) -> bool:
    """Whether `x` holds halves on a CPU, and `num_rows` rows of it are better multiplied in float32."""
    return x.dtype in HALVES and x.is_cpu and widening_pays(num_rows, x.dtype)


def linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in float32 on halves, rounded once at the end; a part of the weights is widened at a time.

    Args:
        x: bfloat16 or float16 (..., K).
        weight: likewise (N, K).
        bias: likewise (N,), or None.

    Returns:
        (..., N) of x's dtype.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    rows = x.float()
    step = max(1, WIDENED_BYTES // (4 * weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        out[..., part] = F.linear(rows, weight[part].float(), None if bias is None else bias[part].float())
    return out
