"""Moves what is hard to round from the tokens to the weights, where a token's widest inputs would spoil the others.

A layer's inputs are multiplied by factors and its weights divided by them, which changes nothing but the rounding
(SmoothQuant, arXiv 2211.10438). Factors are powers of two, exact in every dtype. How far to go is tried out for each
layer on measured tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from audioflamingo.kernels import quantize_rows
from audioflamingo.quantization.calibration import LayerInputs

STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # 1 makes all inputs equally large, 0 leaves them
SAMPLED_ROWS = 128  # outputs that a strength is judged by
_LEAST, _MOST = -12, 12  # exponents of the factors

RoundedRows = Callable[[Tensor, Tensor], Tensor]


def choose_factors(weight: Tensor, inputs: LayerInputs, round_rows: RoundedRows) -> Tensor:
    """The factors that keep a layer's outputs closest to the exact ones.

    Args:
        weight: any float dtype `(N, K)`.
        inputs: what the layer gets.
        round_rows: the value of rounded weights `(n, K)`, given weights and the importance of each input.

    Returns:
        Powers of two, float32 `(K,)`, to multiply inputs by; all 1 when nothing is better than that.
    """
    rows = weight[:: -(-len(weight) // SAMPLED_ROWS)].float()
    tokens = inputs.tokens.float()
    exact = tokens @ rows.T
    best = torch.ones(weight.shape[1])
    least_error = torch.inf
    for factors in (best, *(_factors(inputs.largest, strength) for strength in STRENGTHS)):
        rounded = round_rows(rows / factors, inputs.mean_squares * factors.square())
        error = float((_round_tokens(tokens * factors) @ rounded.T - exact).norm())
        if error < least_error:
            least_error, best = error, factors
    return best


def _factors(largest: Tensor, strength: float) -> Tensor:
    """Factors that bring the inputs' magnitudes nearer to their median."""
    used = largest[largest > 0]
    if not len(used):
        return torch.ones_like(largest)
    exponents = (-strength * (largest / used.median()).log2()).round().clamp(_LEAST, _MOST)
    return torch.where(largest > 0, exponents.exp2(), 1.0)


def _round_tokens(tokens: Tensor) -> Tensor:
    values, scales = quantize_rows(tokens)
    return values.float() * scales[:, None]
