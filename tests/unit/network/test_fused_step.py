"""A decode step in one call: it gives what the layers give one by one, and leaves to them what is not its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from audioflamingo.kernels import linear_halves, native
from audioflamingo.network import qwen2
from audioflamingo.network.fused_step import run_step
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span
from audioflamingo.quantization.quantize_model import quantize
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.skipif(
    not native.has_step(), reason="no kernels for AVX2 were built from these sources"
)
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LENGTHS = (5, 40, 17, 3)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def layers_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(qwen2, "run_step", lambda *_: None)


def language_model(**changes: Any) -> Any:
    return tiny_model(**{**SHAPE, **changes}).model.language_model


def halve(model: Any) -> None:
    """Rounds the linear layers' weights to float16, and keeps them so."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data = module.weight.data.half()


def quantized(scheme: str, dtype: torch.dtype, is_smoothed: bool) -> Any:
    """A language model in int8 or int4, which is the same in either dtype."""
    model = quantize(tiny_model(**SHAPE).bfloat16(), scheme, group_size=32 if scheme == "int4" else None)
    generator = torch.Generator().manual_seed(1)
    for name, module in model.model.language_model.named_modules():
        if is_smoothed and name.endswith(("o_proj", "down_proj")):
            exponents = torch.randint(-2, 3, (module.in_features,), generator=generator)
            module.smoothing = torch.exp2(exponents.float()).bfloat16()
    return model.to(dtype).model.language_model


def prefilled(model: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[KVStore, list[Span], Tensor]:
    """Rows of unequal length, the first one stored last, and an embedding of a token behind each."""
    generator = torch.Generator().manual_seed(3)
    store, room = KVStore(len(model.layers), 64 * len(lengths)), 64
    spans = [Span((len(lengths) - 1 - row) * room, room) for row in range(len(lengths))]
    dtype = model.norm.weight.dtype
    x = torch.randn(sum(lengths), model.config.hidden_size, generator=generator).to(dtype)
    starts = [span.start for span in spans]
    layout = PackedLayout.of(starts, [0] * len(lengths), lengths, torch.device("cpu"))
    model.forward_packed(x, KVView(store, layout))
    for span, length in zip(spans, lengths, strict=True):
        span.length = length
    return store, spans, torch.randn(len(lengths), model.config.hidden_size, generator=generator).to(dtype)


def step(model: Any, store: KVStore, spans: list[Span], x: Tensor) -> Tensor:
    view = view_of(store, spans)
    return model.forward_packed(x, view)


def view_of(store: KVStore, spans: list[Span]) -> KVView:
    starts, past = [span.start for span in spans], [span.length for span in spans]
    layout = PackedLayout.of(starts, past, [1] * len(spans), torch.device("cpu"))
    return KVView(store, layout)


def assert_taken(model: Any, store: KVStore, spans: list[Span], x: Tensor) -> None:
    view = view_of(store, spans)
    assert run_step(model.layers, x, model._rotary(x, view.layout), view) is not None


def widened(store: KVStore) -> KVStore:
    """The same keys and values in float32."""
    wide = KVStore(len(store.keys), store.num_slots)
    for buffers, wide_buffers in ((store.keys, wide.keys), (store.values, wide.values)):
        wide_buffers[:] = [None if buffer is None else buffer.float() for buffer in buffers]
    return wide


@pytest.mark.parametrize("is_half", [False, True])
def test_a_step_gives_what_the_layers_give(is_half: bool, layers_alone: Callable[[], None]) -> None:
    model = language_model()
    if is_half:
        halve(model)
    store, spans, x = prefilled(model)
    assert_taken(model, store, spans, x)
    fused = step(model, store, spans, x)
    written = [buffer.clone() for buffer in (*store.keys, *store.values) if buffer is not None]
    layers_alone()
    store, spans, x = prefilled(model)
    plain = step(model, store, spans, x)
    torch.testing.assert_close(fused, plain, atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(written, (*store.keys, *store.values), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_a_step_in_float16_is_as_near_to_float32_as_the_layers_are(layers_alone: Callable[[], None]) -> None:
    """It rounds nothing between the layers, so it is nearer."""
    model = language_model().half()
    store, spans, x = prefilled(model)
    wide, wide_store = language_model(), widened(store)
    wide.load_state_dict(model.state_dict())
    assert_taken(model, store, spans, x)
    fused = step(model, store, spans, x)
    written = [buffer.clone() for buffer in (*store.keys, *store.values) if buffer is not None]
    expected = step(wide, wide_store, spans, x.float())
    layers_alone()
    plain = step(model, store, spans, x)
    assert fused.dtype == torch.float16
    fused_error, plain_error = (
        (found.float() - expected).norm() / expected.norm() for found in (fused, plain)
    )
    assert fused_error <= plain_error < 5e-3
    for mine, theirs in zip(written, (*wide_store.keys, *wide_store.values), strict=True):
        assert theirs is not None
        torch.testing.assert_close(mine.float(), theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_step_in_float16_gives_what_the_layers_give(
    scheme: str, layers_alone: Callable[[], None]
) -> None:
    model = quantized(scheme, torch.float16, True)
    store, spans, x = prefilled(model)
    assert_taken(model, store, spans, x)
    fused = step(model, store, spans, x)
    layers_alone()
    plain = step(model, store, spans, x)
    assert (fused.float() - plain.float()).norm() <= 1e-2 * plain.float().norm()


def test_float16_is_read_and_rounded_as_torch_does_it() -> None:
    """Values pass the kernel's own conversions as `weight / 2 + bias`, which is exact in float32.

    Zeros, subnormals, the largest, infinity from 65520 on, and halves of a step, which go to the even side.
    """
    tiny, step_at_1 = 2.0**-24, 2.0**-10
    sums = [
        (0.0, 0.0), (0.0, -0.0), (0.0, tiny), (0.0, -tiny), (0.0, 3 * 2.0**-20), (0.0, 2.0**-14), (0.0, 65504.0),
        (0.0, -65504.0), (0.0, 0.1), (tiny, 0.0), (tiny, tiny), (-tiny, -2 * tiny), (tiny, 2.0**-14),
        (step_at_1, 1.0), (step_at_1, 1.0 + step_at_1), (-step_at_1, -1.0), (1.5 * step_at_1, 1.0),
        (30.0, 65504.0), (32.0, 65504.0), (-32.0, -65504.0),
    ]  # fmt: skip
    model = language_model().half()
    for layer in model.layers:
        layer.input_layernorm.eps = 0.0  # the norm of a row of ones is then the norm's weight
    model.layers[0].input_layernorm.weight.fill_(0.5)
    projection = model.layers[0].self_attn.v_proj
    weight, bias = torch.tensor(sums).half().repeat(len(projection.bias), 1)[: len(projection.bias)].unbind(1)
    projection.weight.zero_()
    projection.weight[:, 0], projection.bias[:] = weight, bias
    store, spans, x = prefilled(model)
    assert_taken(model, store, spans, torch.ones_like(x))
    expected = (weight.float() / 2 + bias.float()).half()
    for span in spans:
        assert torch.equal(store.values[0][:, span.start + span.length].reshape(-1), expected)


@pytest.mark.parametrize("is_smoothed", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_step_in_float32_gives_what_the_layers_give(
    scheme: str, is_smoothed: bool, layers_alone: Callable[[], None]
) -> None:
    model = quantized(scheme, torch.float32, is_smoothed)
    store, spans, x = prefilled(model)
    assert_taken(model, store, spans, x)
    fused = step(model, store, spans, x)
    written = [buffer.clone() for buffer in (*store.keys, *store.values) if buffer is not None]
    layers_alone()
    store, spans, x = prefilled(model)
    plain = step(model, store, spans, x)
    # An activation on the border between two integers may fall to either side.
    assert (fused - plain).norm() <= 2e-3 * plain.norm()
    for mine, theirs in zip(written, (*store.keys, *store.values), strict=True):
        assert theirs is not None
        assert (mine - theirs).norm() <= 2e-3 * theirs.norm()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_step_in_bfloat16_rounds_as_the_layers_do(
    scheme: str, layers_alone: Callable[[], None]
) -> None:
    model = quantized(scheme, torch.bfloat16, True)
    store, spans, x = prefilled(model)
    wide, wide_store = quantized(scheme, torch.float32, True), widened(store)
    assert_taken(model, store, spans, x)
    fused = step(model, store, spans, x)
    layers_alone()
    plain = step(model, store, spans, x)
    expected = step(wide, wide_store, spans, x.float())
    assert fused.dtype == torch.bfloat16
    fused_error, plain_error = (
        (found.float() - expected).norm() / expected.norm() for found in (fused, plain)
    )
    # Where torch is fast in bfloat16 the layers attend in it, which rounds elsewhere.
    assert 0.5 * plain_error < fused_error < 1.5 * plain_error < 0.03


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    model = language_model()
    store, spans, x = prefilled(model, (7,) * 7)
    together = step(model, store, spans, x)
    for row in (0, 3, 6):
        assert torch.equal(step(model, store, [spans[row]], x[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.layers[1].mlp.register_forward_hook(lambda *_: None),
        lambda model: setattr(model.layers[0].self_attn, "implementation", "eager"),
        lambda model: setattr(model.layers[0].mlp, "up_proj", torch.nn.Linear(96, 160, bias=False)),
        lambda model: model.layers[1].mlp.up_proj.half(),
        lambda model: model.train(),
        lambda model: model.layers[1].self_attn.q_proj.weight.set_(torch.randn(96, 256).T),
    ],
)
def test_layers_that_are_changed_run_one_by_one(spoil: Callable[[Any], Any]) -> None:
    model = language_model()
    store, spans, x = prefilled(model)
    spoil(model)
    view = view_of(store, spans)
    assert run_step(model.layers, x, model._rotary(x, view.layout), view) is None


def test_what_is_no_step_runs_layer_by_layer() -> None:
    for changes in ({"head_dim": 24}, {"hidden_size": 40}):
        model = language_model(**changes)
        store, spans, x = prefilled(model)
        view = view_of(store, spans)
        assert run_step(model.layers, x, model._rotary(x, view.layout), view) is None
    model = language_model()
    store, spans, x = prefilled(model)
    view = view_of(store, spans)
    rotary = model._rotary(x, view.layout)
    with torch.enable_grad():
        assert run_step(model.layers, x, rotary, view) is None
    assert run_step(model.layers, x.double(), rotary, view) is None
    two_tokens = PackedLayout.of([spans[0].start], [5], [2], torch.device("cpu"))
    assert run_step(model.layers, x[:2], model._rotary(x[:2], two_tokens), KVView(store, two_tokens)) is None
    assert run_step(model.layers, x, rotary, KVView(None, view.layout)) is None


def test_float8_runs_layer_by_layer() -> None:
    model = quantized("fp8", torch.float32, False)
    store, spans, x = prefilled(model)
    view = view_of(store, spans)
    assert run_step(model.layers, x, model._rotary(x, view.layout), view) is None


@pytest.mark.parametrize(("rows", "outputs"), [(1, 5), (4, 33), (7, 16), (16, 50), (17, 3)])
def test_weights_kept_in_float16_count_as_if_they_were_widened(rows: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (
        torch.randn(rows, 64, generator=generator),
        torch.randn(outputs, 64, generator=generator).half(),
    )
    bias = torch.randn(outputs, generator=generator)
    for shift in (None, bias):
        expected = torch.nn.functional.linear(
            x.double(), weight.double(), None if shift is None else shift.double()
        )
        torch.testing.assert_close(linear_halves(x, weight, shift).double(), expected, atol=1e-5, rtol=1e-5)
    assert linear_halves(x[:0], weight).shape == (0, outputs)
