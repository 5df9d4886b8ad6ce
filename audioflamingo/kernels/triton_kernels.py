"""Matrix products with few rows on a GPU, in Triton: bound by reading the weights, which are used as they lie.

Packed weights are read in words of four bytes (`weight_layout`): a word is one output row's next four inputs (8 bits)
or eight (4 bits), and the words of 16 rows stand side by side. The integers become floats without a conversion, which
would be slow: put into the mantissa of 1.0 they are `1 + n / 256` or `1 + n / 16`, from which one multiplication and
addition make the exact integer weight. Float8 weights (E4M3) lie in words like those of 8 bits, and their bits are
those of a float16 that is 256 times as small. Either is a bfloat16 or float16 without rounding; sums and scales are
float32.

Importing this module needs the package triton, which comes with torch for CUDA.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from audioflamingo.kernels.weight_layout import BLOCK_ROWS, scale_bytes

MAX_FEW_ROWS = 64
_ROWS_IN_BLOCK = tl.constexpr(BLOCK_ROWS)
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which cannot multiply bfloat16
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _weights_of(words, scales, i: tl.constexpr, is_4_bit: tl.constexpr, is_float: tl.constexpr):
    """The weights at place `i` of each word, float32; `scales` are the group scales of 4-bit words."""
    if is_float:
        return _float8_weights(words, i)
    return _integer_weights(words, scales, i, is_4_bit)


@triton.jit
def _float8_weights(words, i: tl.constexpr):
    bits = (words >> (8 * i)) ^ 0x80  # as 8-bit integers are stored
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256


@triton.jit
def _integer_weights(words, scales, i: tl.constexpr, is_4_bit: tl.constexpr):
    position: tl.constexpr = 8 * (i % 4) + 4 * (i // 4) if is_4_bit else 8 * i  # of the integer in the word
    top: tl.constexpr = 19 if is_4_bit else 15  # where its lowest bit goes
    mask: tl.constexpr = 0x780000 if is_4_bit else 0x7F8000
    moved = (words << (top - position)) if position <= top else (words >> (position - top))
    floats = ((moved & mask) | 0x3F800000).to(tl.float32, bitcast=True)
    return floats * (scales * 16) - scales * 24 if is_4_bit else floats * 256 - 384


@triton.jit
def _load_words(words_ptr, base, p, num_words, is_there):
    """Words `p` of some output rows, `(P, N)`; those of 0 behind the end are never used."""
    mask = (p < num_words)[:, None] & is_there[None, :]
    return tl.load(words_ptr + base[None, :] + p[:, None] * _ROWS_IN_BLOCK, mask=mask, other=0)


@triton.jit
def _load_scales(bytes_ptr, base, p, num_words, is_there, words_in_group):
    """Group scales of the same words, float32 `(P, N)`."""
    mask = (p < num_words)[:, None] & is_there[None, :]
    places = base[None, :] + (p // words_in_group)[:, None] * _ROWS_IN_BLOCK
    return tl.load(bytes_ptr + places, mask=mask, other=0).to(tl.float32)


@triton.jit
def _packed_kernel(
    x_ptr,  # a single row as it is, else (places in a word, M, words of a row): see `packed_linear`
    words_ptr,
    bytes_ptr,  # the same memory
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_out,
    num_words: tl.constexpr,  # the numbers of a row follow from its inputs, of which there are few kinds in a model
    words_in_block: tl.constexpr,
    first_word: tl.constexpr,
    words_in_group: tl.constexpr,
    has_bias: tl.constexpr,
    is_4_bit: tl.constexpr,
    is_float: tl.constexpr,
    dot_type: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_p: tl.constexpr,
):
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    is_there = n < num_out
    block = (n // _ROWS_IN_BLOCK).to(tl.int64)
    row = n % _ROWS_IN_BLOCK
    base = block * words_in_block + first_word + row
    scale_base = block * words_in_block * 4 + row
    per_word: tl.constexpr = 8 if is_4_bit else 4
    sums = tl.zeros((block_p if block_m == 1 else block_m, block_n), tl.float32)
    for start in range(0, num_words, block_p):
        p = start + tl.arange(0, block_p)
        words = _load_words(words_ptr, base, p, num_words, is_there)
        scales = words
        if is_4_bit:
            scales = _load_scales(bytes_ptr, scale_base, p, num_words, is_there, words_in_group)
        for i in tl.static_range(per_word):
            weights = _weights_of(words, scales, i, is_4_bit, is_float)
            if block_m == 1:
                x = tl.load(x_ptr + p * per_word + i, mask=p < num_words, other=0).to(tl.float32)
                sums += weights * x[:, None]
            else:
                places = (i * num_rows + m)[:, None] * num_words + p[None, :]
                x_mask = (m < num_rows)[:, None] & (p < num_words)[None, :]
                x = tl.load(x_ptr + places, mask=x_mask, other=0).to(dot_type)
                sums = tl.dot(x, weights.to(dot_type), sums, input_precision="ieee")
    channel = tl.load(scales_ptr + n, mask=is_there, other=0)
    bias = channel * 0
    if has_bias:
        bias = tl.load(bias_ptr + n, mask=is_there, other=0).to(tl.float32)
    if block_m == 1:
        result = tl.sum(sums, axis=0) * channel + bias
        tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=is_there)
    else:
        result = sums * channel[None, :] + bias[None, :]
        out_mask = (m < num_rows)[:, None] & is_there[None, :]
        tl.store(
            out_ptr + m[:, None] * num_out + n[None, :], result.to(out_ptr.dtype.element_ty), mask=out_mask
        )


@triton.jit
def _unpack_kernel(
    words_ptr,
    bytes_ptr,
    scales_ptr,
    out_ptr,
    num_out,
    num_in: tl.constexpr,
    num_words: tl.constexpr,
    words_in_block: tl.constexpr,
    first_word: tl.constexpr,
    words_in_group: tl.constexpr,
    is_4_bit: tl.constexpr,
    is_float: tl.constexpr,
    block_p: tl.constexpr,
):
    block_n: tl.constexpr = _ROWS_IN_BLOCK
    row = tl.arange(0, block_n)
    block = tl.program_id(0).to(tl.int64)
    n = block * block_n + row
    is_there = n < num_out
    p = tl.program_id(1) * block_p + tl.arange(0, block_p)
    base = block * words_in_block + first_word + row
    words = _load_words(words_ptr, base, p, num_words, is_there)
    scales = words
    if is_4_bit:
        scale_base = block * words_in_block * 4 + row
        scales = _load_scales(bytes_ptr, scale_base, p, num_words, is_there, words_in_group)
    channel = tl.load(scales_ptr + n, mask=is_there, other=0)
    # Neighbouring inputs side by side, `(P, N, places)`, so that whole lines of the result are written.
    per_word: tl.constexpr = 8 if is_4_bit else 4
    if is_4_bit:
        halves = tl.join(
            _four(words, scales, 0, is_4_bit, is_float), _four(words, scales, 4, is_4_bit, is_float)
        )
        weights = tl.permute(halves, (0, 1, 4, 2, 3))  # (P, N, half, 2, 2)
    else:
        weights = _four(words, scales, 0, is_4_bit, is_float)  # (P, N, 2, 2)
    weights = tl.reshape(weights, (block_p, block_n, per_word))
    weights = weights * channel[None, :, None]
    k = p[:, None, None] * per_word + tl.arange(0, per_word)[None, None, :]
    mask = is_there[None, :, None] & (k < num_in)
    tl.store(out_ptr + n[None, :, None] * num_in + k, weights.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _four(words, scales, i: tl.constexpr, is_4_bit: tl.constexpr, is_float: tl.constexpr):
    """The weights at the places `i` to `i + 3`, `(P, N, 2, 2)`."""
    even = tl.join(
        _weights_of(words, scales, i, is_4_bit, is_float),
        _weights_of(words, scales, i + 2, is_4_bit, is_float),
    )
    odd = tl.join(
        _weights_of(words, scales, i + 1, is_4_bit, is_float),
        _weights_of(words, scales, i + 3, is_4_bit, is_float),
    )
    return tl.join(even, odd)


@triton.jit
def _float_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in: tl.constexpr,
    has_bias: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    is_there = n < num_out
    base = n.to(tl.int64) * num_in
    sums = tl.zeros((block_n, block_k), tl.float32)
    for start in range(0, num_in, block_k):
        k = start + tl.arange(0, block_k)
        mask = is_there[:, None] & (k < num_in)[None, :]
        weights = tl.load(weight_ptr + base[:, None] + k[None, :], mask=mask, other=0).to(tl.float32)
        x = tl.load(x_ptr + k, mask=k < num_in, other=0).to(tl.float32)
        sums += weights * x[None, :]
    result = tl.sum(sums, axis=1)
    if has_bias:
        result += tl.load(bias_ptr + n, mask=is_there, other=0).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _rotate_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    num_heads,
    num_key_heads,
    half: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.arange(0, half)
    cos = tl.load(cos_ptr + token * 2 * half + place).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * half + place).to(tl.float32)
    if head < num_heads:
        source, target = query_ptr, query_out_ptr
        base = (token * num_heads + head) * 2 * half
    else:
        source, target = key_ptr, key_out_ptr
        base = (token * num_key_heads + head - num_heads) * 2 * half
    first = tl.load(source + base + place).to(tl.float32)
    second = tl.load(source + base + half + place).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + base + place, (first * cos - second * sin).to(kind))
    tl.store(target + base + half + place, (second * cos + first * sin).to(kind))


@triton.jit
def _silu_kernel(gate_ptr, up_ptr, out_ptr, num_values, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = place < num_values
    gate = tl.load(gate_ptr + place, mask=mask, other=0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + place, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=mask)


def rotate_both(query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Turns queries `(N, H, E)` and keys `(N, K, E)` by their positions' angles; E is twice a power of two."""
    cos, sin = (values.contiguous() for values in rotary)  # (N, 1, E)
    query, key = query.contiguous(), key.contiguous()
    turned = torch.empty_like(query), torch.empty_like(key)
    num_tokens, num_heads, head_dim = query.shape
    grid = (num_tokens, num_heads + key.shape[1])
    _rotate_kernel[grid](
        query, key, cos, sin, *turned, num_heads, key.shape[1], half=head_dim // 2, num_warps=1
    )
    return turned


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    block = 1024
    _silu_kernel[(triton.cdiv(gate.numel(), block),)](gate, up, out, gate.numel(), block=block)
    return out


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    group: int | None,
    is_float: bool = False,
) -> Tensor:
    """A linear layer with packed weights for up to `MAX_FEW_ROWS` rows.

    Args:
        x: bfloat16, float16 or float32 `(M, K)`.
        packed: as `pack_int8` or `pack_int4` make it.
        scales: float32 `(N,)`.
        bias: `(N,)`, or None.
        shape: (N, K).
        group: inputs that share a group scale; None for 8 bits.
        is_float: the 8 bits are a float8.

    Returns:
        `(M, N)` in the dtype of `x`.
    """
    (num_rows, _), (num_out, num_in) = x.shape, shape
    layout = _layout(packed, num_in, group)
    per_word, num_words = layout["per_word"], layout["num_words"]
    if num_in % per_word:
        x = torch.nn.functional.pad(x, (0, num_words * per_word - num_in))
    if num_rows > 1:
        # A word's places one after the other, so that what is multiplied together is read in whole lines.
        x = x.reshape(num_rows, num_words, per_word).permute(2, 0, 1)
    x = x.contiguous()
    out = x.new_empty(num_rows, num_out)
    block_m, block_n, block_p = blocks(num_rows, is_4_bit=group is not None)
    grid = (triton.cdiv(num_out, block_n), triton.cdiv(num_rows, block_m))
    _packed_kernel[grid](
        x,
        packed.view(torch.int32),
        packed,
        scales,
        scales if bias is None else bias,
        out,
        num_rows,
        num_out,
        num_words,
        layout["words_in_block"],
        layout["first_word"],
        layout["words_in_group"],
        has_bias=bias is not None,
        is_4_bit=group is not None,
        is_float=is_float,
        dot_type=tl.float32 if _IS_INTERPRETED else _DOT_TYPES[x.dtype],
        block_m=block_m,
        block_n=block_n,
        block_p=block_p,
        num_warps=4,
    )
    return out


def unpack(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    group: int | None,
    dtype: torch.dtype,
    is_float: bool = False,
) -> Tensor:
    """The weights `(N, K)` that packed ones stand for, rounded to `dtype`; arguments as for `packed_linear`."""
    num_out, num_in = shape
    layout = _layout(packed, num_in, group)
    out = torch.empty(num_out, num_in, dtype=dtype, device=packed.device)
    block_p = 64
    grid = (packed.shape[0], triton.cdiv(layout["num_words"], block_p))
    _unpack_kernel[grid](
        packed.view(torch.int32),
        packed,
        scales,
        out,
        num_out,
        num_in,
        layout["num_words"],
        layout["words_in_block"],
        layout["first_word"],
        layout["words_in_group"],
        is_4_bit=group is not None,
        is_float=is_float,
        block_p=block_p,
        num_warps=4,
    )
    return out


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of one row `(1, K)` with weights `(N, K)`: `(1, N)`."""
    num_out, num_in = weight.shape
    out = x.new_empty(1, num_out)
    block_n, block_k = (4, 1024) if num_in >= 1024 else (16, 256)
    _float_kernel[(triton.cdiv(num_out, block_n),)](
        x.contiguous(),
        weight,
        weight if bias is None else bias,
        out,
        num_out,
        num_in,
        has_bias=bias is not None,
        block_n=block_n,
        block_k=block_k,
        num_warps=4,
    )
    return out


def _layout(packed: Tensor, num_in: int, group: int | None) -> dict[str, int]:
    """Numbers of packed weights in words of four bytes."""
    per_word = 4 if group is None else 8
    return {
        "per_word": per_word,
        "num_words": -(-num_in // per_word),
        "words_in_block": packed.shape[1] // 4,
        "first_word": 0 if group is None else scale_bytes(num_in // group) // 4,
        "words_in_group": 1 if group is None else group // 8,
    }


def blocks(num_rows: int, is_4_bit: bool) -> tuple[int, int, int]:
    """How much a program takes on: rows, outputs, words of each."""
    if num_rows == 1:
        return 1, 16, 128 if is_4_bit else 256
    if num_rows <= 16:
        return 16, 32, 64
    return (32 if num_rows <= 32 else 64), 64, 32
