"""What is claimed of a GPU, on a GPU: a test for every claim. Without one they are skipped.

`tests/unit/network/test_gpu_paths.py` and `tests/unit/kernels/test_gpu_kernels.py` check what can be checked without.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.engine.captured_steps import CapturedSteps, DecodeStep, Flight
from audioflamingo.engine.choosing import choose_ids
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Request, SamplingParams
from audioflamingo.engine.sampling import LogitsRules, Uniforms
from audioflamingo.kernels import gpu
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span
from audioflamingo.processor.prompt import Prompt
from audioflamingo.quantization import quantize
from audioflamingo.quantization.quantize_model import packed_layers
from tests.support.generation_models import MANY_EOS, lively_model
from tests.support.tiny_model import make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
BATCH = make_batch([([300, 40], 6), ([], 4), ([50], 9)])
LENGTHS = (5, 700, 33)


def on_card(dtype: torch.dtype = torch.float32) -> Any:
    return lively_model(hidden_size=64).to(CUDA, dtype)


def to_card(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(CUDA) for name, value in batch.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def prefilled(model: Any) -> tuple[KVStore, list[Span], torch.Tensor]:
    """Rows of unequal length with gaps between them, out of order; and their last tokens."""
    store = KVStore(model.config.text_config.num_hidden_layers, 3000)
    spans = [Span(2000, 900), Span(1, 800), Span(1000, 60)]
    layout = PackedLayout.of([span.start for span in spans], [0] * 3, LENGTHS, CUDA)
    ids = torch.randint(10, 400, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(CUDA)
    logits = model.packed_logits(model.embed(ids), KVView(store, layout))
    for span, length in zip(spans, LENGTHS, strict=True):
        span.length = length
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    return store, spans, logits[last.to(CUDA)].argmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_captured_step_gives_the_logits_of_an_eager_one(dtype: torch.dtype) -> None:
    model = on_card(dtype)
    store, spans, tokens = prefilled(model)
    step = DecodeStep(model, store, 4, 4096, scratch=0)
    step.record(torch.cuda.graph_pool_handle())
    step.load(tokens.tolist(), spans)
    for turn in range(4):
        lengths = [span.length + turn for span in spans]
        layout = PackedLayout.of([span.start for span in spans], lengths, [1] * 3, CUDA)
        expected = model.packed_logits(model.embed(step.tokens[:3].clone()), KVView(store, layout))
        step.run()
        assert step.logits is not None
        assert relative_error(step.logits[:3], expected) < (1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": MANY_EOS},
        {"do_sample": True, "seed": 3, "top_k": 40},
        {"repetition_penalty": 1.3},
        {"num_beams": 3},
    ],
)
def test_captured_answers_are_those_of_eager_steps(options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 20, "eos_token_id": [], **options}
    batch = to_card(BATCH)
    expected = on_card().generate(**batch, **options)
    model = on_card()
    model.compiles_steps = True
    for _ in range(2):
        assert model.generate(**batch, **options).tolist() == expected.tolist()
    assert not model.kept_steps.has_failed
    assert model.kept_steps.num_recorded >= 1


@torch.no_grad()
def test_rows_of_unequal_length_give_what_each_gives_alone() -> None:
    model = on_card(torch.bfloat16)
    together = model(**to_card(BATCH), logits_to_keep=1).logits[:, -1]
    alone = [
        model(**to_card(make_one), logits_to_keep=1).logits[0, -1]
        for make_one in (single(row) for row in range(3))
    ]
    for row in range(3):
        assert relative_error(together[row], alone[row]) < 0.03


def single(row: int) -> dict[str, torch.Tensor]:
    """One row of the batch without its padding."""
    is_real = BATCH["attention_mask"][row] == 1
    windows = {0: slice(0, 2), 1: slice(0, 0), 2: slice(2, 3)}[row]
    batch = {"input_ids": BATCH["input_ids"][row, is_real][None]}
    if row != 1:
        batch |= {name: BATCH[name][windows] for name in ("input_features", "input_features_mask")}
    return batch


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 33, 64, 65, 300])
def test_packed_products_are_those_of_the_dequantized_weights(scheme: str, num_rows: int) -> None:
    model = quantize(lively_model(hidden_size=64, intermediate_size=192).bfloat16(), scheme).to(CUDA)
    layers = packed_layers(model)
    assert len(layers) > 10
    for name, layer in layers.items():
        if name.endswith("embed_tokens"):
            continue
        x = torch.randn(num_rows, layer.shape[1], device=CUDA).bfloat16()
        bias = None if layer.bias is None else layer.bias.float()  # type: ignore[union-attr]
        expected = F.linear(x.float(), layer.dequantize(), bias)  # type: ignore[arg-type]
        assert relative_error(layer(x), expected) < 0.01, name


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_packed_model_answers_on_the_card(scheme: str) -> None:
    model = quantize(lively_model(hidden_size=64).bfloat16(), scheme).to(CUDA)
    model.compiles_steps = True
    answers = model.generate(**to_card(BATCH), max_new_tokens=8, eos_token_id=[])
    assert answers.shape == (3, BATCH["input_ids"].shape[1] + 8)
    assert not model.kept_steps.has_failed


@torch.no_grad()
def test_the_small_kernels_of_a_step_are_those_of_torch() -> None:
    x, weight = torch.randn(1, 3584, device=CUDA).bfloat16(), torch.randn(1000, 3584, device=CUDA).bfloat16()
    bias = torch.randn(1000, device=CUDA).bfloat16()
    with gpu.step_kernels():
        assert gpu.takes_row(x, weight, bias)
        found = gpu.linear_row(x, weight, bias)
    assert relative_error(found, F.linear(x.double(), weight.double(), bias.double())) < 0.005
    gate, up = torch.randn(2, 9, 999, device=CUDA).bfloat16().unbind()
    assert relative_error(gpu.silu_times(gate, up), F.silu(gate.double()) * up.double()) < 0.005


@torch.no_grad()
@pytest.mark.parametrize("rules", [{}, {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7}])
def test_nothing_is_waited_for_inside_a_step(rules: dict[str, Any]) -> None:
    model = on_card(torch.bfloat16)
    model.compiles_steps = True
    engine = Engine(model, None, EngineOptions.alone(3))
    groups = [
        engine.submit(
            Request(
                Prompt([5 + i] * (10 * i + 3)),
                SamplingParams(LogitsRules(**rules)),
                uniforms=Uniforms(1, [i]),
            )
        )
        for i in range(3)
    ]
    for _ in range(4):
        engine.step()
    step = engine._running
    assert step is not None, "steps are not captured"
    rows = [group.sequences[0] for group in groups]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.load([7, 8, 9], [row.used_span for row in rows])
            step.run()
            assert step.logits is not None
            chosen = choose_ids(rows, step.logits[:3], 1)
            step.feed(chosen)
            flight = Flight.of(rows, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(flight.tokens()) == 3


def test_memory_is_returned() -> None:
    def run() -> None:
        model = on_card(torch.bfloat16)
        model.compiles_steps = True
        model.generate(**to_card(BATCH), max_new_tokens=8, eos_token_id=[])
        assert model.kept_steps.num_recorded

    run()  # what libraries keep for good
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_steps_are_recorded_once_for_many_calls() -> None:
    model = on_card(torch.bfloat16)
    model.compiles_steps, model.kept_steps = True, CapturedSteps()
    counts = []
    for _ in range(4):
        model.generate(**to_card(BATCH), max_new_tokens=8, eos_token_id=[])
        counts.append(model.kept_steps.num_recorded)
    assert counts[-1] == counts[0]


def test_features_of_the_card_are_those_of_the_cpu() -> None:
    generator = np.random.default_rng(0)
    windows = [generator.standard_normal(n).astype(np.float32) for n in (5000, 480_000, 77_777)]
    extractor = AudioFlamingo3FeatureExtractor()
    expected, mask = extractor.extract(windows)
    extractor.device = CUDA
    found, found_mask = extractor.extract(windows)
    assert found.device == found_mask.device == CUDA
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=0)
    assert torch.equal(found_mask.cpu(), mask)
