"""A model over two GPUs, without a GPU: accelerate's hooks around fake CUDA tensors.

See `tests.support.fake_cuda` for the method: operations that mix devices fail on fake tensors as they would on GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from audioflamingo.checkpoint import device_map
from audioflamingo.errors import DeviceError
from audioflamingo.network.adapters import AdapterWeights, Lora
from tests.support import fake_cuda
from tests.support.fake_cuda import Playback
from tests.support.tiny_model import make_batch, tiny_model

LAYERS = "model.language_model.layers"
GENERATION_MODULES = (
    "engine.beam_search",
    "engine.choosing",
    "engine.generate",
    "engine.sampling",
    "network.adapters",
    "processor.collate",
)
FIRST, SECOND = "cuda:0", "cuda:1"
SPLITS = {
    "last half": {f"{LAYERS}.1": SECOND, "model.language_model.norm": SECOND, "lm_head": SECOND},
    "audio": {"model.audio_tower": SECOND, "model.multi_modal_projector": SECOND},
    "encoder only": {"model.audio_tower": SECOND},
    "middle": {f"{LAYERS}.1": SECOND},
}


@pytest.fixture
def playback(monkeypatch: pytest.MonkeyPatch) -> Playback:
    names = (f"audioflamingo.{name}" for name in GENERATION_MODULES)
    monkeypatch.setattr(fake_cuda, "MODULES", (*fake_cuda.MODULES, *names))
    keys = itertools.count()  # a window is known by its values, which fake tensors do not have
    monkeypatch.setattr("audioflamingo.processor.prompt.window_key", lambda *_: b"%16d" % next(keys))
    return Playback(monkeypatch)


def split_fake_model(split: dict[str, str]) -> Any:
    """The tiny model with fake parameters on several devices, connected as `from_pretrained` does."""
    model = tiny_model()
    wish = device_map.Placement({name: torch.device(device) for name, device in {"": FIRST, **split}.items()})
    placement = device_map.Placement(device_map._coarsest(model, wish))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=placement.device_of(name))
        model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(fake, requires_grad=False)
    device_map.connect_devices(model, placement, model.get_input_embeddings())
    assert model.device == torch.device(FIRST)
    return model


def run_split(
    playback: Playback,
    split: dict[str, str],
    run: Callable[[Any, dict[str, Any]], Any],
    batch: dict[str, Any],
) -> None:
    """Runs on the CPU, then on a split model of fake tensors."""
    with torch.no_grad():
        playback.compare(run, batch, build_fake=lambda: split_fake_model(split))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_forward(playback: Playback, split: dict[str, str]) -> None:
    run_split(
        playback, split, lambda m, batch: m(**batch).logits, make_batch([([300, 1], 6), ([], 4), ([50], 9)])
    )


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_loss(playback: Playback, split: dict[str, str]) -> None:
    batch = make_batch([([300], 6), ([50], 9)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    run_split(playback, split, lambda model, batch: model(**batch).loss, batch)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}, {"num_beams": 2}]
)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_generate(playback: Playback, split: dict[str, str], options: dict[str, Any]) -> None:
    def run(model: Any, batch: dict[str, Any]) -> Any:
        return model.generate(**batch, max_new_tokens=5, do_sample=False, **options)

    run_split(playback, split, run, make_batch([([300], 6), ([50], 9)]))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_adapters(playback: Playback, split: dict[str, str]) -> None:
    """Of the language model and the projector, LoRA and replaced; for all rows, and for one of two."""

    def run(model: Any, batch: dict[str, Any]) -> Any:
        def change(name: str, rank: int = 2) -> Lora:
            rows, columns = model.get_submodule(name).weight.shape
            with torch.device("cpu"):
                return Lora(torch.ones(rank, columns), torch.ones(rows, rank), 0.01)

        names = (f"{LAYERS}.0.self_attn.q_proj", f"{LAYERS}.1.mlp.down_proj", "lm_head")
        audio = "model.multi_modal_projector.linear_1"
        with torch.device("cpu"):
            replaced = {audio: {"bias": torch.ones(model.get_submodule(audio).bias.shape)}}
        weights = AdapterWeights({name: change(name) for name in (*names, audio)}, replaced)
        model.adapters.add(model, "mine", weights)
        with model.use_adapter("mine"):
            assert model(**batch).logits.shape[0] == 2
        return model.generate(**batch, max_new_tokens=5, do_sample=False, adapter=["mine", None])

    run_split(playback, split, run, make_batch([([300], 6), ([50], 9)]))


def test_inputs_cannot_reach_parts_in_cpu_memory_first() -> None:
    with FakeTensorMode(), pytest.raises(DeviceError, match="token embeddings on 'cpu'"):
        split_fake_model({"model.language_model": "cpu"})
