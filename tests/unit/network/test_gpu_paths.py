"""The ways that only a GPU takes, without one.

Their arithmetic: torch's flash attention is replaced by a few lines that say what it is documented to do. Their shapes
and devices: fake CUDA tensors, which have no data, see `tests.support.fake_cuda`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audioflamingo.engine.captured_steps import CapturedSteps, DecodeStep
from audioflamingo.kernels import gpu, unpack_int8
from audioflamingo.network import attention, encoder
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span
from audioflamingo.network.row_layout import Bounds
from audioflamingo.quantization.layers import QuantizedEmbedding, QuantizedLinear
from audioflamingo.quantization.quantize_model import quantize
from audioflamingo.quantization.schemes import LayerFormat
from tests.support.fake_cuda import WithoutCudaRuntime
from tests.support.generation_models import MANY_EOS, lively_model
from tests.support.tiny_model import make_batch, tiny_model

BATCH = make_batch([([300, 40], 6), ([], 4), ([50], 9)])


def row_by_row(
    query: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, *, scale: float, is_causal: bool
) -> Tensor:
    """What variable-length attention is: row i's queries begin at `offsets[i]`, its keys at `starts[i]`."""
    out = torch.full_like(query, torch.nan)
    assert bounds.offsets.dtype == bounds.starts.dtype == bounds.ends.dtype == torch.int32
    assert len(bounds.offsets) == len(bounds.starts) == len(bounds.ends) + 1
    for row, num_keys in enumerate(bounds.ends.tolist()):
        first, last = bounds.offsets[row : row + 2].tolist()
        start = int(bounds.starts[row])
        assert last - first <= bounds.most_new
        assert num_keys <= bounds.most_keys
        q = query[first:last].transpose(0, 1)[None]  # (1, H, T, E)
        k, v = (kv[start : start + num_keys].transpose(0, 1)[None] for kv in (keys, values))
        mask = None
        if is_causal:
            mask = torch.ones(last - first, num_keys).bool().tril(num_keys - (last - first))
        found, _ = attention.eager_attention(q, k, v, mask, scale)
        out[first:last] = found[0].transpose(0, 1)
    return out


@pytest.fixture
def any_lengths(monkeypatch: pytest.MonkeyPatch) -> list[Bounds]:
    """All attention goes the way of a GPU; the calls that were made."""
    calls: list[Bounds] = []

    def attend(query: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, **options: Any) -> Tensor:
        calls.append(bounds)
        return row_by_row(query, keys, values, bounds, **options)

    for module in (attention, encoder):
        monkeypatch.setattr(module, "takes_any_lengths", lambda *_, **__: True)
        monkeypatch.setattr(module, "attend_any_lengths", attend)
    monkeypatch.setattr(attention, "_is_worth_one_call", lambda *_: True)
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"eos_token_id": MANY_EOS}, {"num_beams": 3}, {"num_return_sequences": 2}]
)
@pytest.mark.parametrize("is_captured", [False, True])
def test_rows_of_any_length_in_one_call_give_the_same_answers(
    options: dict[str, Any], is_captured: bool, request: pytest.FixtureRequest
) -> None:
    options = {"max_new_tokens": 12, "eos_token_id": [], "seed": 1, **options}
    options["do_sample"] = "num_return_sequences" in options
    expected = lively_model().generate(**BATCH, **options)
    calls = request.getfixturevalue("any_lengths")
    model = lively_model()
    if is_captured:
        model.compiles_steps, model.kept_steps = True, CapturedSteps(is_recorded=False)
    assert model.generate(**BATCH, **options).tolist() == expected.tolist()
    assert len(calls) > 20


def test_windows_of_any_length_attend_in_one_call(request: pytest.FixtureRequest) -> None:
    model = tiny_model()
    batch = make_batch([([300, 40, 3000, 300, 40], 6)])
    features, mask = batch["input_features"], batch["input_features_mask"]
    with torch.no_grad():
        expected = model.get_audio_features(features, mask)
        calls = request.getfixturevalue("any_lengths")
        found = model.get_audio_features(features, mask)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    assert len(calls) == model.config.audio_config.num_hidden_layers


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without data on a card that is not there, of a kind that has flash attention."""
    for module in (attention, encoder):
        monkeypatch.setattr(module, "has_flash", lambda _: True, raising=False)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), WithoutCudaRuntime():
        yield


def fake_model(scheme: str | None = None) -> Any:
    """A tiny model in bfloat16 on the card, its heads as wide as flash attention needs them; or a packed one."""
    with unset_fake_temporarily():
        model = tiny_model(hidden_size=64).bfloat16()
        if scheme is not None:
            quantize(model, scheme)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = torch.nn.Parameter(fake, False) if tensors is module._parameters else fake
    return model


CUDA = torch.device("cuda")
FLOAT8 = LayerFormat(8, is_float=True)


def test_prefill_and_decode_of_unequal_rows_stay_on_the_card(fake_cuda: None) -> None:
    model = fake_model()
    store = KVStore(2, 100)
    layout = PackedLayout.of([0, 60, 30], [0, 3, 7], [5, 1, 4], CUDA, room=[30, 40, 30])
    x = torch.empty(10, 64, dtype=torch.bfloat16, device=CUDA)
    logits = model.packed_logits(x, KVView(store, layout))
    assert logits.device.type == "cuda"
    assert logits.shape == (10, model.config.text_config.vocab_size)
    assert "groups" not in layout.__dict__, "rows were attended to one group after the other"
    assert "bounds" in layout.__dict__


def test_a_captured_step_stays_on_the_card(fake_cuda: None) -> None:
    model = fake_model()  # a step does not keep it
    step = DecodeStep(model, KVStore(2, 100), num_rows=4, window=4096, scratch=0)
    step.load([5, 6], [Span(1, 20, 3), Span(40, 20, 9)])
    step.run()
    assert step.logits is not None
    assert step.chosen is not None
    assert {step.logits.device.type, step.chosen.device.type, step.tokens.device.type} == {"cuda"}
    assert step.logits.shape[0] == step.chosen.shape[0] == 4


class OnlyOnTheCard(TorchDispatchMode):
    """Refuses what cannot be recorded: values read by the host, shapes that depend on values, tensors of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        is_by_number = func is torch.ops.aten.index.Tensor and all(
            index is None or index.dtype == torch.int64 for index in args[1]
        )
        assert not tags or is_by_number, f"{func} waits for the device"
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), f"{func} has a tensor of the host"
        self.num_operations += 1
        return found


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "fp8"])
def test_every_operation_of_a_captured_step_can_be_recorded(fake_cuda: None, scheme: str | None) -> None:
    model = fake_model(scheme)
    step = DecodeStep(model, KVStore(2, 100), num_rows=4, window=4096, scratch=0)
    step.load([5, 6], [Span(1, 20, 3), Span(40, 20, 9)])
    with OnlyOnTheCard() as operations:
        step.run()
        step.run()
    assert operations.num_operations > 100


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.cpu()])
def test_operations_that_cannot_be_recorded_are_found(fake_cuda: None, read: Any) -> None:
    """The method itself."""
    x = torch.empty(4, device=CUDA)
    with OnlyOnTheCard(), pytest.raises((AssertionError, RuntimeError)):
        read(x)


def test_encoding_stays_on_the_card(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "to_host", lambda _: [[300, 40], [1, 1]])
    features = torch.empty(2, 128, 3000, device=CUDA)
    mask = torch.empty(2, 3000, dtype=torch.int32, device=CUDA)
    found = fake_model().get_audio_features(features, mask)
    assert found.pooler_output.device.type == "cuda"
    assert found.pooler_output.shape == (75 + 10, 64)


@pytest.mark.parametrize("format_", [LayerFormat(8), LayerFormat(4, 32), LayerFormat(8, None, True), FLOAT8])
@pytest.mark.parametrize("num_rows", [1, 200])
def test_packed_layers_stay_on_the_card(fake_cuda: None, format_: LayerFormat, num_rows: int) -> None:
    with CUDA:
        layer = QuantizedLinear(64, 40, True, format_)
    layer.bias = torch.nn.Parameter(torch.empty(40, dtype=torch.bfloat16, device=CUDA), requires_grad=False)
    if layer.smoothing is not None:
        layer.smoothing = layer.smoothing.bfloat16()
    out = layer(torch.empty(2, num_rows, 64, dtype=torch.bfloat16, device=CUDA))
    assert out.device.type == "cuda"
    assert (out.shape, out.dtype) == ((2, num_rows, 40), torch.bfloat16)


def test_products_of_float8_are_those_of_rows_rounded_one_by_one() -> None:
    """On a CPU, where torch has this product too; which rows take it is the card's."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(64, 48, True, FLOAT8)
    layer.fill(torch.randn(48, 64, generator=generator), "layer")
    x = torch.randn(70, 64, generator=generator) * torch.logspace(-3, 3, 70)[:, None]
    x[5] = 0
    bias = torch.randn(48, generator=generator).bfloat16()
    weight = unpack_int8(layer.packed, layer.shape).view(torch.float8_e4m3fn)
    assert gpu.fits_float8_product(x.bfloat16(), layer.shape)
    try:
        found = gpu.float8_product(x.bfloat16(), weight, layer.scales, bias)
    except RuntimeError as error:
        if "per-tensor" in str(error):
            pytest.skip("on a CPU this torch has no float8 product with a scale for each row")
        raise
    scales = x.bfloat16().float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 448
    rows = (x.bfloat16().float() / scales).to(torch.float8_e4m3fn).float() * scales
    expected = torch.nn.functional.linear(rows, layer.dequantize(), bias.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)
    near = torch.nn.functional.linear(x, layer.dequantize(), bias.float())
    assert (found.float() - near).norm() < 0.05 * near.norm()


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float16, (48, 64)), (torch.bfloat16, (40, 64)), (torch.bfloat16, (48, 40))]
)
def test_what_no_product_of_float8_takes_is_unpacked(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert not gpu.fits_float8_product(torch.empty(70, shape[1], dtype=dtype), shape)


def test_packed_embeddings_are_those_of_the_cpu() -> None:
    table = QuantizedEmbedding(50, 30, LayerFormat(8))
    table.fill(torch.randn(50, 30, generator=torch.Generator().manual_seed(0)), "embed_tokens")
    ids = torch.tensor([[3, 49], [0, 3]])
    expected = table(ids)
    found = gpu.gather_packed(ids, table.packed, table.scales, table.shape, table.dtype)
    assert torch.equal(found, expected)
