"""Attention on a CPU, of rows of any length to keys that lie anywhere.

Scores, softmax and sums are float32; a query's result does not depend on the queries beside it. Factors are float32, or
bfloat16 where the processor multiplies those faster. Whether torch's own kernel is to be taken, `is_faster` measures.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from audioflamingo.errors import ArgumentError
from audioflamingo.kernels import halves, native
from audioflamingo.kernels.host import to_host
from audioflamingo.kernels.linear import INPUT_DTYPES

LEAST_TRIAL, MOST_TRIAL = 64, 1024  # queries of a trial, and as many keys
TRIAL_SCORES, MOST_TRIAL_HEADS = 1 << 18, 4  # so many heads that a short trial is not all overhead
LEAST_GAIN = 0.97  # torch's kernel is left for no less


def runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_rows` takes such tensors: float32 or bfloat16 on a CPU, compiled kernels, nothing is trained.

    Where gradients are on the answer is no for frozen parts, too: which kernel is faster is measured in each process,
    and a run that goes on in another one has to find the same numbers.
    """
    tensors = (query, key, value)
    return (
        query.dtype in INPUT_DTYPES
        and all(t.is_cpu and t.dtype == query.dtype and t.stride(-1) == 1 for t in tensors)
        and query.numel() > 0
        and native.active() != native.TORCH
        and not torch.is_grad_enabled()
    )


def is_faster(dtype: torch.dtype, head_dim: int, num_queries: int, is_causal: bool) -> bool:
    """Whether rows of so many queries are answered faster by `attend_rows` than by torch.

    Measured on this CPU when such rows first come, once for all of a like length: a trial takes some milliseconds.
    """
    length = min(max(LEAST_TRIAL, 1 << (num_queries - 1).bit_length()), MOST_TRIAL)
    return _wins(dtype, head_dim, length, is_causal)


@functools.cache
def _wins(dtype: torch.dtype, head_dim: int, length: int, is_causal: bool) -> bool:
    heads = max(1, min(MOST_TRIAL_HEADS, TRIAL_SCORES // length**2))
    query = torch.ones(length, heads, head_dim, dtype=dtype)
    offsets, zero = torch.tensor([0, length], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    wide = dtype == torch.bfloat16 and halves.widening_pays(length)  # what torch's kernel would be given

    def ours() -> None:
        attend_rows(query, query, query, (offsets, zero, offsets[1:]), scale=1.0, is_causal=is_causal)

    def torchs() -> None:
        rows = query.transpose(0, 1)[None]
        rows = rows.float() if wide else rows
        F.scaled_dot_product_attention(rows, rows, rows, is_causal=is_causal).to(dtype)

    seconds = dict.fromkeys((ours, torchs), float("inf"))
    with torch.no_grad():
        for _ in range(3):  # the first round warms up
            for run in seconds:
                start = time.perf_counter()
                run()
                seconds[run] = min(seconds[run], time.perf_counter() - start)
    return seconds[ours] < seconds[torchs] * LEAST_GAIN


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Attention of packed rows, each to its own stretch of keys. `runs` says whether it can be called.

    Args:
        query: of all rows, `(N, H, E)`.
        keys: `(slots, K, E)`, K divides H; any strides, the last axis contiguous.
        values: likewise.
        rows: int32: where each row's queries begin and the last ends `(R + 1,)`, the slot of each row's first key, and
            how many keys it has, `(R,)` or more.
        scale: factor of the scores.
        is_causal: the last of a row's queries stands at its last key, and all look back only.

    Returns:
        `(N, H, E)`.

    Raises:
        ArgumentError: rows that do not fit the tensors, or a causal row with more queries than keys.
    """
    offsets, starts, ends = (numbers.int().contiguous() for numbers in rows)
    _check(query, keys, values, (offsets, starts, ends), is_causal)
    out = query.new_empty(query.shape)
    backend = native.active()
    if backend == native.LEVELS[-1] and query.dtype == torch.bfloat16 and halves.slowness() >= 1:
        backend = native.LEVELS[-2]  # which multiplies in float32
    native.attention(
        backend,
        torch.get_num_threads(),
        (INPUT_DTYPES.index(query.dtype), is_causal, scale),
        (len(offsets) - 1, query.shape[1], keys.shape[1], query.shape[2]),
        (*query.stride()[:2], *keys.stride()[:2], *values.stride()[:2]),
        tuple(t.data_ptr() for t in (offsets, starts, ends, query, keys, values, out)),
    )
    return out


def _check(
    query: Tensor, keys: Tensor, values: Tensor, rows: tuple[Tensor, Tensor, Tensor], is_causal: bool
) -> None:
    """What the kernel reads lies within the tensors."""
    offsets, starts, ends = rows
    num_rows = len(offsets) - 1
    if keys.shape != values.shape or query.shape[2] != keys.shape[2] or query.shape[1] % keys.shape[1]:
        raise ArgumentError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit."
        )
    numbers = [to_host(t) for t in (offsets, starts[:num_rows], ends[:num_rows])]
    if not len(numbers[1]) == len(numbers[2]) == num_rows or numbers[0][-1] != len(query):
        raise ArgumentError(f"offsets, starts and ends do not name rows of {len(query)} queries.")
    for begin, end, start, count in zip(numbers[0], numbers[0][1:], *numbers[1:], strict=False):
        least = end - begin if is_causal else min(end - begin, 1)
        if not (0 <= begin <= end and start >= 0 and least <= count <= len(keys) - start):
            raise ArgumentError(
                f"a row of {end - begin} queries cannot look at {count} keys from slot {start} on of {len(keys)}."
            )
