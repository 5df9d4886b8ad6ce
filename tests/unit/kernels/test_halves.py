"""The way through float32 gives what layers of halves give, whichever of the two this CPU prefers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from audioflamingo.kernels import halves
from audioflamingo.kernels.modules import Conv1d, Linear
from audioflamingo.network.attention import attend
from tests.support.tiny_model import tiny_model


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is slow in bfloat16."""
    monkeypatch.setattr(halves, "slowness", lambda *_: 50.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is quick in bfloat16."""
    monkeypatch.setattr(halves, "slowness", lambda *_: 0.5)


@pytest.mark.parametrize("dtype", halves.HALVES)
def test_the_measured_slowness_is_a_number_above_zero(dtype: torch.dtype) -> None:
    assert 0 < halves.slowness(dtype) < 1000
    assert halves.slowness(dtype) == halves.slowness(dtype)  # measured once
    assert halves.slowness() == halves.slowness(torch.bfloat16)


def test_few_rows_and_quick_processors_stay_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for slowness, num_rows in ((0.5, 10_000), (1.0, 10_000), (2.0, halves.WIDENING_ROWS)):
        monkeypatch.setattr(halves, "slowness", lambda *_, slowness=slowness: slowness)
        assert not halves.widening_pays(num_rows)
    assert halves.widening_pays(halves.WIDENING_ROWS + 1)


@pytest.mark.parametrize("step", [1, 7, 1 << 25])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_rounded_once(step: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "WIDENED_BYTES", 4 * 300 * step)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 25, 300).bfloat16(), torch.randn(70, 300).bfloat16()
    bias = torch.randn(70).bfloat16() if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = halves.linear_widened(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", halves.HALVES)
def test_layers_attention_and_convolutions_take_it(slow: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, conv = Linear(64, 48).to(dtype), Conv1d(8, 6, 3, stride=2, padding=1).to(dtype)
    x, signal = torch.randn(90, 64).to(dtype), torch.randn(1, 8, 90).to(dtype)
    query = torch.randn(1, 4, 90, 16).to(dtype)
    with torch.no_grad():
        found = (linear(x), conv(signal), attend(query, query, query, implementation="sdpa", scale=0.25)[0])
        wide = (
            F.linear(x.float(), linear.weight.float(), linear.bias.float()),
            F.conv1d(signal.float(), conv.weight.float(), conv.bias.float(), 2, 1),
            F.scaled_dot_product_attention(query.float(), query.float(), query.float(), scale=0.25),
        )
    for out, expected in zip(found, wide, strict=True):
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", halves.HALVES)
def test_a_model_says_the_same_both_ways(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().to(dtype).eval()
    ids = torch.arange(2, 92)[None] % 40 + 2
    logits = []
    for slowness in (0.5, 50.0):
        monkeypatch.setattr(halves, "slowness", lambda *_, slowness=slowness: slowness)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits.float())
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)


def test_gradients_flow_through_it(slow: None) -> None:
    conv = Conv1d(8, 6, 3).bfloat16()
    signal = torch.randn(1, 8, 90).bfloat16().requires_grad_()
    conv(signal).sum().backward()
    assert signal.grad is not None
    assert conv.weight.grad is not None
    query = torch.randn(1, 4, 90, 16).bfloat16().requires_grad_()
    attend(query, query, query, implementation="sdpa", scale=0.25)[0].sum().backward()
    assert query.grad is not None


def test_quick_processors_run_torchs_own(quick: None) -> None:
    linear, x = Linear(64, 48).bfloat16(), torch.randn(90, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
