"""How far is a quantized layer's output from the exact one, beside llama.cpp's Q8_0 and Q4_0?

Layers have the real number of inputs and a sample of outputs; weights and tokens are random, so the figures compare
schemes and say nothing about answers. The reference is the product in float64. Three kinds of input:

  even         Gaussian tokens and weights
  outliers     a few columns of the tokens are 30 times as large as the others, as in trained models
  heavy tails  weights with a Student distribution of 5 degrees of freedom

"weights" is the error of the rounded weights alone; "all" rounds the tokens too, as the kernels of each do: ours to
int8 with one scale a token, llama.cpp's to int8 in blocks of 32. Q8_0 and Q4_0 follow their public definition: blocks
of 32 weights with a float16 scale; Q8_0 `round(w / d)`, `d = max |w| / 127`; Q4_0 `floor(w / d + 8.5)` within 0..15,
minus 8, `d = m / -8` with m the weight of the largest magnitude. "calibrated" knows other tokens of the same kind: it
weighs errors by the mean square of each column, and may scale columns first.

    python benchmarks/quantization_error.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from audioflamingo.kernels import quantize_rows
from audioflamingo.quantization.calibration import NUM_TOKENS, LayerInputs
from audioflamingo.quantization.layers import QuantizedLinear
from audioflamingo.quantization.schemes import LayerFormat

BLOCK = 32
OUTLIER_SIZE = 30.0
NUM_OUTLIERS = 8
DEGREES_OF_FREEDOM = 5.0
LAYERS = {"encoder fc2": 5120, "q_proj": 3584, "down_proj": 18944}  # inputs
CALIBRATED = ", calibrated"
KINDS = ("even", "outliers", "heavy tails")


@dataclass(frozen=True)
class Scheme:
    """A way to round a layer.

    Attributes:
        name: for the table.
        bits: stored bits a weight, scales included.
        round: the rounded weights `(N, K)` and tokens `(M, K)`, given both and other tokens of the same kind.
    """

    name: str
    bits: float
    round: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def blocks_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, BLOCK))


def q8_0(x: Tensor) -> Tensor:
    blocks = blocks_of(x)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales.clamp(min=1e-30)).round() * scales.half().float()).flatten(-2)


def q4_0(x: Tensor) -> Tensor:
    blocks = blocks_of(x)
    extremes = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = extremes / -8
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (((blocks * inverse + 8.5).floor().clamp(0, 15) - 8) * scales.half().float()).flatten(-2)


def by_token(x: Tensor) -> Tensor:
    values, scales = quantize_rows(x)
    return values.float() * scales[:, None]


def peer(
    round_weights: Callable[[Tensor], Tensor], round_tokens: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda weight, tokens, _: (round_weights(weight), round_tokens(tokens))


def ours(format_: LayerFormat) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def round_both(weight: Tensor, tokens: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        layer = QuantizedLinear(weight.shape[1], weight.shape[0], bias=False, format_=format_)
        inputs = LayerInputs(others.square().mean(0), others.abs().amax(0), others[:NUM_TOKENS].bfloat16())
        layer.fill(weight, "layer", inputs if format_.is_smoothed else None)
        factors = torch.ones(1) if layer.smoothing is None else layer.smoothing
        return layer.dequantize(), by_token(tokens * factors) / factors

    return round_both


def schemes() -> Iterator[Scheme]:
    bfloat16 = peer(lambda w: w.bfloat16().float(), lambda x: x.bfloat16().float())
    yield Scheme("bfloat16", 16, bfloat16)
    yield Scheme("llama.cpp Q8_0", 8.5, peer(q8_0, q8_0))
    for is_calibrated in (False, True):
        yield Scheme(f"int8{CALIBRATED * is_calibrated}", 8, ours(LayerFormat(8, None, is_calibrated)))
    yield Scheme("llama.cpp Q4_0", 4.5, peer(q4_0, q8_0))
    for group in (32, 64, 128):
        for is_calibrated in (False, True):
            name = f"int4, group {group}{CALIBRATED * is_calibrated}"
            yield Scheme(name, 4 + 8 / group, ours(LayerFormat(4, group, is_calibrated)))


def make_inputs(kind: str, num_in: int, num_out: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `(N, K)`, tokens `(M, K)`, and other tokens like them."""
    torch.manual_seed(0)
    weight = torch.randn(num_out, num_in)
    if kind == "heavy tails":
        weight = torch.distributions.StudentT(DEGREES_OF_FREEDOM).sample((num_out, num_in))
    tokens = torch.randn(2 * num_tokens, num_in)
    if kind == "outliers":
        tokens[:, torch.randperm(num_in)[:NUM_OUTLIERS]] *= OUTLIER_SIZE
    return weight, tokens[:num_tokens], tokens[num_tokens:]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measure(kind: str, num_in: int, num_out: int, num_tokens: int) -> list[dict[str, float | str]]:
    weight, tokens, others = make_inputs(kind, num_in, num_out, num_tokens)
    exact = tokens.double() @ weight.double().T
    rows: list[dict[str, float | str]] = []
    for scheme in schemes():
        rounded, rounded_tokens = (part.double() for part in scheme.round(weight, tokens, others))
        rows.append(
            {
                "kind": kind,
                "inputs": num_in,
                "scheme": scheme.name,
                "bits": scheme.bits,
                "weights": relative_error(tokens.double() @ rounded.T, exact),
                "all": relative_error(rounded_tokens @ rounded.T, exact),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=512, help="sampled outputs of each layer")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()

    results: list[dict[str, Any]] = []
    for kind in KINDS:
        print(f"\n{kind:30} {'bits':>5}" + "".join(f"{name:>22}" for name in LAYERS))
        print(f"{'':36}" + f"{'weights':>13}{'all':>9}" * len(LAYERS))
        measured = [measure(kind, num_in, options.outputs, options.tokens) for num_in in LAYERS.values()]
        for columns in zip(*measured, strict=True):
            errors = "".join(
                f"{100 * column['weights']:12.2f}%{100 * column['all']:8.2f}%" for column in columns
            )
            print(f"{columns[0]['scheme']:30} {columns[0]['bits']:5.2f}{errors}")
            results += columns
    print(json.dumps({"benchmark": "quantization_error", "results": results}))


if __name__ == "__main__":
    main()
