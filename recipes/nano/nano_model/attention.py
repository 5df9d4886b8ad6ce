"""Whisper's attention in a layer of Qwen2's kind.

LayerNorm's gain and bias go into the matrices behind it. A head has 64 dimensions; some of its rotary pairs turn and
one holds the kind of token, so of the 64 directions of Whisper's scores the weakest are left out: those that change
the scores of the given tokens least. The output's bias rides on a value: Qwen2's output projection has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import CONST, CONTENT, HEAD, HEADS, KIND, STATE, WIDTH, Layer
from .whisper import Attention, Norm

CROSS_CONTENT = [dim for dim in CONTENT if dim % (HEAD // 2) > 3]  # pair 3 turns over the length of a clip
DAMPING = 2e-3  # of the tokens' second moments: what the tokens at hand do not show still counts a little


@dataclass(frozen=True)
class Seen:
    """Tokens that a layer's queries and keys are made of, as its normed inputs (N, WIDTH) each."""

    queries: Tensor
    keys: Tensor


def fold(
    part: Attention, query_norm: Norm, key_norm: Norm, key_scale: float, query_scale: float
) -> dict[str, Tensor]:
    """Weights (STATE, STATE) and biases that act on the stream's normed state instead of LayerNorm's output.

    Args:
        part: Whisper's.
        query_norm, key_norm: the LayerNorms before it.
        query_scale, key_scale: LayerNorm's length over that of the model's RMSNorm.
    """
    (query_gain, query_bias), (key_gain, key_bias) = query_norm, key_norm
    return {
        "q": part.q * query_gain * query_scale,
        "bq": part.q @ query_bias + part.bq,
        "k": part.k * key_gain * key_scale,
        "bk": part.k @ key_bias,
        "v": part.v * key_gain * key_scale,
        "bv": part.v @ key_bias + part.bv,
        "o": part.o - part.o.mean(0),
        "bo": part.bo - part.bo.mean(),
    }


def root_of(x: Tensor) -> Tensor:
    """Cholesky factor of the damped second moments of (N, D)."""
    moments = (x.T @ x / len(x)).double()
    return torch.linalg.cholesky(moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments)))


def with_one(x: Tensor) -> Tensor:
    """(N, D) to (N, D + 1): a bias is one more column."""
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def low_rank(matrix: Tensor, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The matrix of a rank that is nearest to `matrix` (M, N) for tokens with roots `left` and `right`, as a product.

    Returns:
        (rank, M) and (rank, N), whose product is it, and the share of the energy that is left out.
    """
    u, values, vt = torch.linalg.svd(left.T @ matrix @ right)
    size = values[:rank].sqrt()
    first = torch.linalg.solve(left.T, u[:, :rank] * size).T
    second = torch.linalg.solve(right.T, vt[:rank].T * size).T
    return first.float(), second.float(), float(values[rank:].pow(2).sum() / values.pow(2).sum())


def put_attention(
    layer: Layer, folded: dict[str, Tensor], seen: Seen, growth: float, is_cross: bool
) -> float:
    """Writes Whisper's heads into a layer.

    Args:
        layer: changed in place.
        folded: from `fold`.
        seen: tokens, for what is left out.
        growth: what the layer adds to the flag CONST, which has to grow with the state.
        is_cross: keys are audio: the rotary pair that turns over a clip is not used.

    Returns:
        The largest share of a head's scores that is left out.
    """
    dims = CROSS_CONTENT if is_cross else CONTENT
    queries, keys = with_one(seen.queries[:, :STATE]), seen.keys[:, :STATE]
    left, right = root_of(queries), root_of(keys - keys.mean(0))
    worst = 0.0
    for head in range(HEADS):
        part = slice(head * HEAD, (head + 1) * HEAD)
        asked = torch.cat([folded["q"][part], folded["bq"][part, None]], 1).double()
        first, second, left_out = low_rank(asked.T @ folded["k"][part].double(), left, right, len(dims))
        rows = [head * HEAD + dim for dim in dims]
        layer.q[rows, :STATE], layer.bq[rows], layer.k[rows, :STATE] = first[:, :-1], first[:, -1], second
        layer.v[part, :STATE], layer.bv[part], layer.o[:STATE, part] = (
            folded["v"][part], folded["bv"][part], folded["o"][:, part],
        )  # fmt: skip
        worst = max(worst, left_out)
    _put_bias(layer, folded["bo"], with_one(keys), growth)
    return worst


def _put_bias(layer: Layer, bias: Tensor, keys: Tensor, growth: float) -> None:
    """The output's bias, and the growth of CONST, on the first head: its values times its output, plus the bias,
    nearest in its 64 dimensions."""
    part = slice(0, HEAD)
    values = torch.cat([layer.v[part, :STATE], layer.bv[part, None]], 1).double()
    wanted = layer.o[:, part].double() @ values
    wanted[:STATE, -1] += bias.double()
    wanted[CONST, -1] += growth
    first, second, _ = low_rank(wanted, torch.eye(WIDTH, dtype=torch.float64), root_of(keys), HEAD)
    layer.o[:, part], layer.v[part, :STATE], layer.bv[part] = first.T, second[:, :-1], second[:, -1]


def score_scale() -> float:
    """Whisper's scores are divided by the root of 64, as here."""
    assert math.isqrt(HEAD) ** 2 == HEAD
    assert KIND < HEAD
    return math.sqrt(HEAD)
