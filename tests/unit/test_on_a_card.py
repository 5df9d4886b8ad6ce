"""What is claimed of a GPU, on a GPU: a test for every claim. Without one they are skipped.

`tests/unit/network/test_gpu_paths.py` and `tests/unit/kernels/test_gpu_kernels.py` check what can be checked without.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.engine import captured_steps
from audioflamingo.engine.captured_steps import CapturedSteps, DecodeStep, Flight
from audioflamingo.engine.choosing import choose_ids
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Output, Request, SamplingParams
from audioflamingo.engine.sampling import LogitsRules, Uniforms
from audioflamingo.engine.worker import EngineWorker
from audioflamingo.errors import AudioFlamingoWarning
from audioflamingo.kernels import gpu
from audioflamingo.kernels.host import to_device
from audioflamingo.network.decode_step import decode_step
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span
from audioflamingo.processor.prompt import Prompt
from audioflamingo.quantization import SCHEMES, quantize
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
MAX_FEW_ROWS = 64  # of `triton_kernels`, which needs triton


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


def test_steps_recorded_before_the_cache_grew_are_not_run_after() -> None:
    """Longer prompts move keys and values; a recorded step would go on reading where they were."""
    model, plain = on_card(torch.bfloat16), on_card(torch.bfloat16)
    model.compiles_steps = True
    for num_tokens in (4, 300, 20, 900):
        ids = torch.arange(10, 10 + num_tokens, device=CUDA).remainder(390)[None]
        options = {"max_new_tokens": 8, "eos_token_id": [], "return_dict_in_generate": True}
        found = model.generate(ids, **options, output_logits=True)
        expected = plain.generate(ids, **options, output_logits=True)
        assert relative_error(found.logits[1], expected.logits[1]) < 0.03
    assert not model.kept_steps.has_failed


def test_the_engines_thread_gives_the_answers_of_eager_steps() -> None:
    prompts = [[5 + i] * (10 * i + 3) for i in range(4)]
    expected = [
        on_card().generate(torch.tensor([ids], device=CUDA), max_new_tokens=12, eos_token_id=[])[0].tolist()
        for ids in prompts
    ]
    model = on_card()
    model.compiles_steps = True
    worker = EngineWorker(Engine(model, None, EngineOptions(cache_tokens=1000)))
    worker.start()
    answers: list[list[int]] = [[] for _ in prompts]
    done = [threading.Event() for _ in prompts]

    def take(place: int, output: Output) -> None:
        answers[place] += output.token_ids
        if output.is_last:
            done[place].set()

    for place, ids in enumerate(prompts):
        params = SamplingParams(max_new_tokens=12)
        worker.submit(Request(Prompt(ids), params, functools.partial(take, place)))
    assert all(event.wait(120) for event in done)
    worker.stop()
    assert [ids + new for ids, new in zip(prompts, answers, strict=True)] == expected
    assert not model.kept_steps.has_failed


def test_a_step_that_cannot_be_captured_is_one_warning_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = on_card().generate(**to_card(BATCH), max_new_tokens=8, eos_token_id=[])
    model = on_card()
    model.compiles_steps = True

    def waiting(*args: Any) -> torch.Tensor:
        logits = decode_step(*args)
        logits.sum().item()
        return logits

    monkeypatch.setattr(captured_steps, "decode_step", waiting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = model.generate(**to_card(BATCH), max_new_tokens=8, eos_token_id=[])
            assert found.tolist() == expected.tolist()
    (message,) = [str(w.message) for w in caught if issubclass(w.category, AudioFlamingoWarning)]
    assert "could not be captured" in message
    assert "not permitted when stream is capturing" in message


def test_nothing_is_captured_or_compiled_that_was_not_asked_for() -> None:
    model = on_card(torch.bfloat16)
    assert not gpu._is_step.get()
    model.generate(**to_card(BATCH), max_new_tokens=4)
    assert model.kept_steps is None


COMPILING = """
import torch
from audioflamingo.quantization import quantize
from tests.support.generation_models import lively_model
model = quantize(lively_model(hidden_size=64).bfloat16(), "int4").to("cuda")
model.compiles_steps = True
model.generate(torch.arange(10, 90, device="cuda")[None], max_new_tokens=4, eos_token_id=[])
assert model.kept_steps.num_recorded
"""


def test_what_was_compiled_is_kept_for_the_next_run(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    counts = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COMPILING], env=environment, check=True)
        counts.append(len(list(tmp_path.rglob("*.cubin"))))
    assert counts[0] == counts[1] > 0


def test_copies_to_and_from_the_card_do_not_wait_for_it() -> None:
    """They queue behind what runs, and so does the reading of tokens."""
    values = torch.arange(5.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.current_stream().record_event()
    numbers, features = to_device([1, 2, 3], CUDA), to_device(values, CUDA)
    flight = Flight.of([], numbers)
    assert not busy.query(), "a copy waited for the step before"
    assert flight.tokens() == [1, 2, 3]
    assert torch.equal(features.cpu(), values)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_auto_is_the_card_and_a_folder_runs_there_as_it_is(scheme: str | None, tmp_path: Path) -> None:
    model = lively_model(hidden_size=64).bfloat16()
    (model if scheme is None else quantize(model, scheme)).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="auto")
    assert loaded.device == CUDA
    ours, stored = loaded.state_dict(), model.state_dict()
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name].cpu(), stored[name]) for name in stored)
    assert loaded.generate(**to_card(BATCH), max_new_tokens=4, eos_token_id=[]).is_cuda


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_while_loading_gives_the_bytes_that_it_gives_on_a_cpu(scheme: str, tmp_path: Path) -> None:
    model = lively_model(hidden_size=64).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="auto", quantization=scheme)
    expected = packed_layers(quantize(model, scheme))
    for name, layer in packed_layers(loaded).items():
        assert layer.packed.is_cuda
        assert torch.equal(layer.packed.cpu(), expected[name].packed), name


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
@pytest.mark.parametrize("scheme", SCHEMES)
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
        # Many rows are themselves rounded where the card multiplies in float8: by 3 % of each number at most.
        is_rounded = layer.format.is_float and num_rows > MAX_FEW_ROWS and gpu.multiplies_float8(CUDA)
        assert relative_error(layer(x), expected) < (0.04 if is_rounded else 0.01), name


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
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
