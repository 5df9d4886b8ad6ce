"""Layers of packed integers: what they compute, and what may be done to them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.kernels import quantize_rows
from audioflamingo.quantization import packing
from audioflamingo.quantization.layers import QuantizedEmbedding, QuantizedLinear, empty_layer
from audioflamingo.quantization.schemes import LayerFormat

FORMATS = [LayerFormat(8), LayerFormat(4, 32), LayerFormat(4, 64)]


def random_linear(num_in: int = 192, num_out: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, bias)


def quantized(module: nn.Module, format_: LayerFormat) -> Any:
    layer = empty_layer(module, format_)
    layer.fill(module.weight.detach(), "layer")
    return layer


def inputs(rows: int, columns: int = 192) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_multiplies_rounded_weights_with_rounded_tokens(
    format_: LayerFormat, bias: bool, dtype: torch.dtype
) -> None:
    linear = random_linear(bias=bias)
    layer = quantized(linear, format_).to(dtype)
    x = inputs(5).to(dtype)
    values, scales = quantize_rows(x)
    expected = values.double() * scales.double()[:, None] @ layer.dequantize().double().T
    if linear.bias is not None:
        expected += linear.bias.detach().to(dtype).double()
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(y.double(), expected, **tolerance)


@pytest.mark.parametrize(("format_", "limit"), zip(FORMATS, (0.02, 0.11, 0.12), strict=True))
def test_the_result_is_near_that_of_the_original(format_: LayerFormat, limit: float) -> None:
    linear = random_linear(bias=False)
    x = inputs(20)
    with torch.no_grad():
        expected = linear(x)
    assert (quantized(linear, format_)(x) - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float8_weights_are_nearest_and_tokens_are_not_rounded(dtype: torch.dtype) -> None:
    linear = random_linear()
    linear.weight.data[7] = 0
    layer = quantized(linear, LayerFormat(8, is_float=True)).to(dtype)
    weight, found = linear.weight.detach(), layer.dequantize()
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / 448
    steps = scales * torch.exp2((weight.abs() / scales).clamp(min=2.0**-6).log2().floor() - 3)
    assert ((found - weight).abs() <= 0.5001 * steps).all()
    x = inputs(5).to(dtype)
    expected = nn.functional.linear(x.double(), found.double(), linear.bias.detach().to(dtype).double())
    assert layer(x).dtype == dtype
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=0.01, atol=1e-5 if dtype == torch.float32 else 0.01
    )
    assert repr(layer) == "QuantizedLinear(192, 40, bits=8, float8)"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(format_: LayerFormat) -> None:
    layer = quantized(random_linear(), format_)
    x = inputs(19).view(1, 19, 192)
    x[0, 3] *= 1000
    together = layer(x)
    assert all(torch.equal(layer(x[:, i]), together[:, i]) for i in range(19))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_matrix_is_packed_a_few_rows_at_a_time(
    format_: LayerFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = random_linear(num_out=75)
    whole = quantized(linear, format_)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 32 * 192)
    in_parts = quantized(linear, format_)
    assert torch.equal(whole.packed, in_parts.packed)
    assert torch.equal(whole.scales, in_parts.scales)


def test_embeddings_are_rows_of_the_table() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 24)
    layer = quantized(embedding, LayerFormat(8))
    ids = torch.tensor([[0, 49], [17, 17]])
    assert isinstance(layer, QuantizedEmbedding)
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert (layer(ids) - embedding(ids)).norm() < 0.01 * embedding(ids).norm()
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_change_of_dtype_leaves_integers_and_scales_alone() -> None:
    layer = quantized(random_linear(), LayerFormat(4, 32))
    before = copy.deepcopy(layer)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for name in ("packed", "scales"):
        assert torch.equal(getattr(layer, name), getattr(before, name))
    layer.half().float().double()
    assert torch.equal(layer.scales, before.scales)


def test_other_devices_are_refused_before_anything_moved() -> None:
    layer = quantized(random_linear(), LayerFormat(8))

    def move(tensor: Tensor) -> Any:
        return SimpleNamespace(device=torch.device("xpu", 0), dtype=tensor.dtype)

    with pytest.raises(DeviceError, match="a CPU or an NVIDIA GPU, not on xpu:0"):
        layer._apply(move)
    assert layer(inputs(1)).shape == (1, 40)


@pytest.mark.parametrize("format_", [LayerFormat(8), LayerFormat(4, 32), LayerFormat(4, 64, True)])
def test_gradients_pass_through_the_dequantized_weights(format_, monkeypatch) -> None:
    """In turns of 16 outputs, so that the last one is not full."""
    monkeypatch.setattr("audioflamingo.quantization.layers._BACKWARD_WEIGHTS", 192 * 17)
    layer = quantized(random_linear(), format_)
    if layer.smoothing is not None:
        layer.smoothing.copy_(2.0 ** torch.randint(-2, 3, (192,)))
    x = inputs(2).requires_grad_()
    out = layer(x)
    assert torch.equal(out, layer(x.detach()))  # trained on what will be served
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ layer.dequantize(), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_its_own_weights_are_not_trained() -> None:
    layer = quantized(random_linear(), LayerFormat(8))
    layer.bias.requires_grad_()
    with pytest.raises(ArgumentError, match="cannot be trained"):
        layer(inputs(2))


def test_weights_that_are_no_numbers_are_refused() -> None:
    linear = random_linear()
    linear.weight.data[30, 5] = torch.nan
    with pytest.raises(ArgumentError, match=r"model\.fc hold NaN"):
        empty_layer(linear, LayerFormat(8)).fill(linear.weight.detach(), "model.fc")


def test_a_layer_says_what_it_is() -> None:
    layer = quantized(random_linear(), LayerFormat(4, 64))
    assert isinstance(layer, QuantizedLinear)
    assert repr(layer) == "QuantizedLinear(192, 40, bits=4, group=64)"
