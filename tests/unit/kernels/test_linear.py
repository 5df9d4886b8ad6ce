"""The layers against float64, and what holds to the bit: across backends, batches and numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audioflamingo import kernels
from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.kernels import halves, native
from tests.support.kernel_weights import random_int4, random_int8

Force = Callable[[str], None]
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Layer:
    """A quantized layer with its integer weights, for reference."""

    shape: tuple[int, int]
    group: int  # 0: int8
    weights: Tensor  # int8 (N, K)
    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.group:
            return kernels.linear_int4(x, self.packed, self.scales, self.bias, self.shape, self.group)
        return kernels.linear_int8(x, self.packed, self.scales, self.bias, self.shape)


def random_layer(rows: int, columns: int, group: int, has_bias: bool, generator: torch.Generator) -> Layer:
    if group:
        values, group_scales = random_int4(rows, columns, group, generator)
        packed = kernels.pack_int4(values, group_scales, group)
        weights = kernels.unpack_int4(packed, (rows, columns), group)
    else:
        weights = random_int8(rows, columns, generator)
        packed = kernels.pack_int8(weights)
    scales = torch.rand(rows, generator=generator) / 100 + 1e-4
    bias = torch.randn(rows, generator=generator) if has_bias else None
    return Layer((rows, columns), group, weights, packed, scales, bias)


def random_input(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of very different sizes, one of zeros, one with a single large number."""
    x = torch.randn(rows, columns, generator=generator)
    x *= 10.0 ** torch.randint(-30, 30, (rows, 1), generator=generator)
    x[rows // 2] = 0
    x[rows // 3, 0] = 3e38
    return x.to(dtype)


def cases(count: int) -> Iterator[tuple[Layer, Tensor]]:
    """Layers of odd and even sizes with inputs of 1 to 40 rows, some of 129 to 300; always the same ones."""
    generator = torch.Generator().manual_seed(count)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for case in range(count):
        group = (0, 0, 32, 64, 128)[draw(0, 4)]
        columns = draw(1, 40) * group if group else (draw(1, 40), draw(41, 2500))[draw(0, 1)]
        layer = random_layer(draw(1, 100), columns, group, case % 2 == 0, generator)
        rows = draw(1, 40) if draw(0, 3) else draw(129, 300)
        yield layer, random_input(rows, columns, DTYPES[draw(0, 1)], generator)


def same_bits(left: Tensor, right: Tensor) -> bool:
    integer = torch.int32 if left.dtype == torch.float32 else torch.int16
    return left.dtype == right.dtype and torch.equal(left.view(integer), right.view(integer))


@pytest.mark.parametrize("backend", native.available())
def test_layers_match_float64(backend: str, force: Force) -> None:
    """The sums are exact, so only a few float32 roundings and that of the result's dtype remain."""
    force(backend)
    for layer, x in cases(60):
        values, row_scales = kernels.quantize_rows(x)
        exact = (
            (values.double() @ layer.weights.double().T)
            * row_scales.double()[:, None]
            * layer.scales.double()
        )
        size = exact.abs()
        if layer.bias is not None:
            exact, size = exact + layer.bias.double(), size + layer.bias.double().abs()
        steps = 4 * 2**-24 + (2**-8 if x.dtype == torch.bfloat16 else 0)
        out = layer(x)
        assert out.dtype == x.dtype
        fits = exact.abs() < 3e38  # beyond it the result is infinity
        assert ((out.double() - exact).abs() <= steps * size + 1e-37)[fits].all()


@pytest.mark.parametrize("backend", native.available()[1:])
def test_every_backend_gives_the_bits_of_torch(backend: str, force: Force) -> None:
    for layer, x in cases(120):
        force("torch")
        expected = layer(x)
        force(backend)
        assert same_bits(layer(x), expected), (layer.shape, layer.group, x.shape, x.dtype)


@pytest.mark.parametrize("backend", native.available()[1:])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_largest_numbers_do_not_overflow(backend: str, group: int, force: Force) -> None:
    """Every product 127 * 127 or -127 * 127, over the longest rows; several panels of the prefill."""
    columns = 131_072 if backend != "generic" else 8192
    weights = torch.full((17, columns), 127, dtype=torch.int8)
    weights[1::2] *= -1
    if group:
        scales = torch.full((17, columns // group), 127, dtype=torch.uint8)
        packed = kernels.pack_int4(weights.sign(), scales, group)
    else:
        packed = kernels.pack_int8(weights)
    layer = Layer((17, columns), group, weights, packed, torch.ones(17), None)
    force(backend)
    for rows in (1, 129):
        out = layer(torch.full((rows, columns), 127.0))
        expected = (weights[:, 0].double() * 127 * columns).float()
        assert torch.equal(out, expected.expand(rows, 17))


@pytest.mark.parametrize("backend", native.available())
@pytest.mark.parametrize("group", [0, 64])
def test_a_row_does_not_depend_on_its_neighbours(backend: str, group: int, force: Force) -> None:
    force(backend)
    generator = torch.Generator().manual_seed(1)
    layer = random_layer(70, 4224, group, True, generator)
    x = torch.randn(250, 4224, generator=generator)
    together = layer(x)
    for rows in (1, 2, 5, 8, 9, 16, 127, 131):
        assert same_bits(layer(x[:rows]), together[:rows])
    assert same_bits(layer(x[249]), together[249])


@pytest.mark.skipif(len(native.available()) == 1, reason="the compiled kernels were not built")
def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    try:
        for layer, x in cases(20):
            torch.set_num_threads(1)
            alone = layer(x)
            torch.set_num_threads(3)
            assert same_bits(layer(x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", native.available())
def test_unusable_rows_give_nan_and_leave_the_others_alone(backend: str, force: Force) -> None:
    force(backend)
    generator = torch.Generator().manual_seed(2)
    layer = random_layer(20, 64, 32, False, generator)
    x = torch.randn(12, 64, generator=generator)
    clean = layer(x)
    x[3, 5], x[7, 0] = float("nan"), float("-inf")
    x[9] = 1e-39
    out = layer(x)
    assert out[[3, 7]].isnan().all()
    assert (out[9] == 0).all()
    kept = [row for row in range(12) if row not in (3, 7, 9)]
    assert same_bits(out[kept], clean[kept])


@pytest.mark.parametrize("backend", native.available())
def test_inputs_of_any_layout(backend: str, force: Force) -> None:
    force(backend)
    generator = torch.Generator().manual_seed(3)
    layer = random_layer(24, 64, 0, True, generator)
    x = torch.randn(2, 64, 3, generator=generator)
    expected = layer(x.transpose(1, 2).contiguous())
    assert expected.shape == (2, 3, 24)
    assert same_bits(layer(x.transpose(1, 2)), expected)
    assert layer(x.transpose(1, 2)[:, :0]).shape == (2, 0, 24)
    with torch.inference_mode():
        assert same_bits(layer(x.transpose(1, 2)), expected)


def test_weights_may_lie_at_any_address() -> None:
    """A mapped file starts its tensors where it likes."""
    generator = torch.Generator().manual_seed(4)
    for group in (0, 32):
        layer = random_layer(50, 96, group, True, generator)
        x = torch.randn(140, 96, generator=generator)
        moved = torch.empty(layer.packed.numel() + 1, dtype=torch.uint8)[1:].view_as(layer.packed)
        moved.copy_(layer.packed)
        expected, few = layer(x), layer(x[:2])
        layer.packed = moved
        assert same_bits(layer(x), expected)
        assert same_bits(layer(x[:2]), few)


def test_quantize_rows_rounds_to_even_within_the_range() -> None:
    values, scales = kernels.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5]))
    assert values.tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert scales.tolist() == [1.0, 0.0]
    values, scales = kernels.quantize_rows(torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]]))
    assert values.tolist() == [[0, 0], [0, 0]]
    assert scales.isnan().all()


def test_a_backward_pass_is_refused() -> None:
    layer = random_layer(8, 32, 0, False, torch.Generator().manual_seed(5))
    x = torch.randn(2, 32, requires_grad=True)
    with pytest.raises(ArgumentError, match="no gradient"):
        layer(x).sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    layer = random_layer(20, 64, 0, True, torch.Generator().manual_seed(6))
    packed, scales, bias, shape = layer.packed, layer.scales, layer.bias, layer.shape
    x = torch.randn(2, 64)
    assert bias is not None
    with pytest.raises(ArgumentError, match="x must be"):
        kernels.linear_int8(x.half(), packed, scales, bias, shape)
    with pytest.raises(ArgumentError, match="64 features"):
        kernels.linear_int8(x[:, :60], packed, scales, bias, shape)
    with pytest.raises(ArgumentError, match="packed"):
        kernels.linear_int8(x, packed.view(torch.int8), scales, bias, shape)
    with pytest.raises(ArgumentError, match="packed"):
        kernels.linear_int4(x, packed, scales, bias, shape, 32)
    with pytest.raises(ArgumentError, match="packed"):
        kernels.linear_int8(x, packed, scales, bias, (40, 64))
    with pytest.raises(ArgumentError, match="scales"):
        kernels.linear_int8(x, packed, scales.double(), bias, shape)
    with pytest.raises(ArgumentError, match="scales"):
        kernels.linear_int8(x, packed, scales[:5], bias, shape)
    with pytest.raises(ArgumentError, match="bias"):
        kernels.linear_int8(x, packed, scales, bias.bfloat16(), shape)
    with pytest.raises(ArgumentError, match="bias"):
        kernels.linear_int8(x, packed, scales, bias[:5], shape)
    with pytest.raises(DeviceError, match="meta"):
        kernels.linear_int8(x, packed.to("meta"), scales, bias, shape)


@pytest.mark.parametrize("backend", [name for name in native.available() if name not in ("torch", "generic")])
def test_bf16_is_at_least_as_accurate_as_torch(backend: str, force: Force) -> None:
    force(backend)
    generator = torch.Generator().manual_seed(7)
    ours, theirs = 0.0, 0.0
    for rows, outputs, columns in [(1, 37, 1000), (3, 64, 3584), (8, 5, 31), (16, 130, 517), (7, 1, 1)]:
        x = torch.randn(rows, columns, generator=generator).bfloat16()
        weight = torch.randn(outputs, columns, generator=generator).bfloat16()
        bias = torch.randn(outputs, generator=generator).bfloat16()
        for shift in (None, bias):
            exact = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
            out = kernels.linear_halves(x, weight, shift)
            size = F.linear(
                x.double().abs(), weight.double().abs(), None if shift is None else shift.abs().double()
            )
            assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * size).all()
            ours += float((out.double() - exact).square().sum())
            theirs += float((F.linear(x, weight, shift).double() - exact).square().sum())
    assert ours <= theirs * 1.001


@pytest.mark.parametrize("backend", [name for name in native.available() if name not in ("torch", "generic")])
def test_bf16_rows_do_not_depend_on_each_other(backend: str, force: Force) -> None:
    force(backend)
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(16, 517, generator=generator).bfloat16()
    weight = torch.randn(130, 517, generator=generator).bfloat16()
    together = kernels.linear_halves(x, weight)
    for row in range(16):
        assert same_bits(kernels.linear_halves(x[row], weight), together[row])
    assert same_bits(kernels.linear_halves(x.view(2, 8, 517), weight), together.view(2, 8, 130))


def test_bf16_leaves_to_torch_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "slowness", lambda *_: 1.0)  # else this CPU may prefer float32
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(24, 40, generator=generator).bfloat16()
    many = torch.randn(17, 40, generator=generator).bfloat16()
    assert torch.equal(kernels.linear_halves(many, weight), F.linear(many, weight))
    assert torch.equal(
        kernels.linear_halves(many.float(), weight.float()), F.linear(many.float(), weight.float())
    )
    assert kernels.linear_halves(many[:0], weight).shape == (0, 24)
    few = many[:2].clone().requires_grad_()
    kernels.linear_halves(few, weight).sum().backward()
    assert few.grad is not None


@pytest.mark.parametrize("num_rows", [1, 16, 17, 300])
@pytest.mark.parametrize("slowness", [0.5, 50.0])
def test_float16_is_as_accurate_as_torch(
    num_rows: int, slowness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows through the kernel, many through float32 where float16 is slow, or through torch."""
    monkeypatch.setattr(halves, "slowness", lambda *_: slowness)
    generator = torch.Generator().manual_seed(10)
    x, weight = (torch.randn(n, 320, generator=generator).half() for n in (num_rows, 45))
    bias = torch.randn(45, generator=generator).half()
    for shift in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        with torch.no_grad():
            out = kernels.linear_halves(x, weight, shift)
        assert out.dtype == torch.float16
        theirs = (F.linear(x, weight, shift).double() - exact).square().sum()
        assert (out.double() - exact).square().sum() <= theirs * 1.001
        apart = torch.stack([x, x], -1)[..., 0]
        with torch.no_grad():
            assert torch.equal(kernels.linear_halves(apart, weight, shift), out)
    assert kernels.linear_halves(x[:0], weight).shape == (0, 45)


def test_float16_has_gradients() -> None:
    x, weight = torch.randn(2, 320).half().requires_grad_(), torch.randn(45, 320).half()
    kernels.linear_halves(x, weight).sum().backward()
    assert x.grad is not None
