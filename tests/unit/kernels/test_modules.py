"""`Linear` is `nn.Linear` to everyone, and at least as exact in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from audioflamingo.kernels.modules import Linear


def layer(dtype: torch.dtype) -> Linear:
    torch.manual_seed(0)
    return Linear(300, 70).to(dtype)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17])
def test_bfloat16_rows_are_as_close_to_the_truth_as_torchs(num_rows: int) -> None:
    linear, x = layer(torch.bfloat16), torch.randn(num_rows, 300).bfloat16()
    truth = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    with torch.no_grad():
        ours, theirs = linear(x), F.linear(x, linear.weight, linear.bias)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 1.01 * (theirs - truth).abs().max() + 1e-6


def test_float32_is_torchs_own() -> None:
    linear, x = layer(torch.float32), torch.randn(3, 300)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow(dtype: torch.dtype) -> None:
    linear, x = layer(dtype), torch.randn(3, 300, dtype=dtype, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(3, -1), atol=0.1)
    assert linear.weight.grad is not None
