"""Factors that make inputs easier to round: exact, and used only where they help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audioflamingo.kernels import quantize_rows
from audioflamingo.quantization.calibration import LayerInputs
from audioflamingo.quantization.layers import QuantizedLinear, empty_layer
from audioflamingo.quantization.schemes import LayerFormat

FORMATS = [LayerFormat(8, None, True), LayerFormat(4, 32, True)]


def tokens_with_outliers(size: float, num_tokens: int = 64, seed: int = 0) -> Tensor:
    tokens = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(seed))
    tokens[:, ::64] *= size
    return tokens


def measured(tokens: Tensor) -> LayerInputs:
    return LayerInputs(tokens.square().mean(0), tokens.abs().amax(0), tokens.bfloat16())


def quantized(linear: nn.Linear, format_: LayerFormat, inputs: LayerInputs | None) -> Any:
    layer = empty_layer(linear, format_)
    layer.fill(linear.weight.detach(), "layer", inputs)
    return layer


@pytest.fixture(name="linear")
def make_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 48, bias=False)


@pytest.mark.parametrize(("format_", "gain"), zip(FORMATS, (0.5, 0.8), strict=True))
@torch.no_grad()
def test_outliers_do_less_harm(linear: nn.Linear, format_: LayerFormat, gain: float) -> None:
    x = tokens_with_outliers(50.0, seed=1)
    plain = quantized(linear, format_, None)
    smoothed = quantized(linear, format_, measured(tokens_with_outliers(50.0)))
    errors = [(layer(x) - linear(x)).norm() for layer in (plain, smoothed)]
    assert errors[1] < gain * errors[0]
    if format_.bits == 8:  # 4-bit weights may do better without factors, by importance alone
        assert smoothed.smoothing[::64].max() < 0.5 < smoothed.smoothing.median()


@pytest.mark.parametrize("format_", FORMATS)
def test_factors_are_powers_of_two_and_part_of_what_the_layer_computes(
    linear: nn.Linear, format_: LayerFormat
) -> None:
    layer = quantized(linear, format_, measured(tokens_with_outliers(50.0)))
    assert isinstance(layer, QuantizedLinear)
    assert layer.smoothing is not None
    mantissas, _ = layer.smoothing.frexp()
    assert set(mantissas.tolist()) == {0.5}
    x = tokens_with_outliers(50.0, seed=1)
    values, scales = quantize_rows(x * layer.smoothing)
    rounded = values.double() * scales.double()[:, None] / layer.smoothing.double()
    torch.testing.assert_close(
        layer(x).double(), rounded @ layer.dequantize().double().T, rtol=1e-4, atol=1e-4
    )


def test_even_inputs_need_no_factors(linear: nn.Linear) -> None:
    x = torch.ones(40, 256) * torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    layer = quantized(linear, FORMATS[0], measured(x))
    assert torch.equal(layer.smoothing, torch.ones(256))


def test_inputs_that_are_never_used(linear: nn.Linear) -> None:
    tokens = tokens_with_outliers(50.0)
    tokens[:, 1::2] = 0
    layer = quantized(linear, FORMATS[1], measured(tokens))
    assert layer.smoothing[1::2].eq(1).all()
    assert layer(torch.ones(1, 256)).isfinite().all()
    layer = quantized(linear, FORMATS[1], measured(torch.zeros_like(tokens)))
    assert layer.smoothing.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_exact_in_every_dtype(linear: nn.Linear, dtype: torch.dtype) -> None:
    layer = quantized(linear, FORMATS[0], measured(tokens_with_outliers(1e5)))
    before = layer.smoothing.clone()
    assert torch.equal(layer.to(dtype).float().smoothing, before)
