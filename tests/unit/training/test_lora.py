"""Adapters from runs: on quantized bases (QLoRA), with 8-bit optimizer state, beside a trained projector."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import audioflamingo
from audioflamingo.errors import ConfigError, MissingDependencyError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from tests.support.tiny_model import make_batch, tiny_reference
from tests.support.tiny_training import config_values, write_model

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("peft", reason="needs peft")

from audioflamingo.training import TrainingConfig, train
from audioflamingo.training.log import read_log
from audioflamingo.training.resume import list_checkpoints
from audioflamingo.training.settings import build
from audioflamingo.training.stage import StageRun
from audioflamingo.training.training_config import LoraSettings

# Sizes that groups of 32 divide; no dropout, so that runs can be compared.
WIDTHS = {"hidden_size": 64, "intermediate_size": 96}


def run(values: dict[str, Any], **options: Any):
    return train(build(TrainingConfig, values), show_progress=False, **options)


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_log(folder / "log.jsonl") if e["kind"] == "train"}


def load(folder: Path, **options: Any) -> AudioFlamingo3ForConditionalGeneration:
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**make_batch([([300], 6)])).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    config_values(folder)
    write_model(folder / "wide", **WIDTHS)
    return folder


def lora_values(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    values = config_values(base, model=str(base / "wide"), output_dir=str(base / name), lora={"rank": 4})
    values["stages"] = [{"learning_rates": {"lora": 1e-2}, "max_steps": 12}]
    values["validation"]["generate_rows"] = 0
    return {**values, **changes}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_lora_learns_on_a_quantized_base(base: Path, scheme: str) -> None:
    """As on the float base up to rounding; the adapter fits the base, the merged model is both in one."""
    result = run(lora_values(base, scheme, quantization=scheme, lora={"rank": 4, "merge": True}))
    if not (base / "float").exists():
        run(lora_values(base, "float"))
    curve, expected = losses(base / scheme), losses(base / "float")
    assert curve[12] < 0.9 * curve[1]
    assert curve == pytest.approx(expected, rel=0.02)
    adapted = load(base / "wide", quantization=scheme)
    plain = logits(adapted)
    adapted.load_adapter(result.last_dir / "adapter", "own")
    with adapted.use_adapter("own"):
        own = logits(adapted)
    merged = logits(load(result.last_dir))
    change = (own - plain).norm()
    assert change > 0.05 * plain.norm()
    assert (merged - own).norm() < 0.3 * change  # activations are rounded in one of the two
    config = json.loads((result.last_dir / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    card = (result.last_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    last = [e for e in read_log(base / scheme / "log.jsonl") if e["kind"] == "validation"][-1]
    assert f"| 12 | {last['loss']:.4f} |" in card
    assert "| train.jsonl | 12 |" in card
    assert f"base in {scheme}" in card
    assert str(base) not in card.replace(str(base / "wide"), "")  # no paths but the model that was named
    assert "library_name: audioflamingo" in (result.last_dir / "README.md").read_text(encoding="utf-8")
    assert (result.last_dir / "adapter" / "curves.png").exists()


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_bfloat16_on_a_cpu_is_in_what_layers_keep(base: Path, scheme: str | None, monkeypatch) -> None:
    """Layers of a quantized base took float32 under autocast, so that what is kept for gradients stayed as large."""
    name = f"bfloat16-{scheme}"
    seen: set[torch.dtype] = set()
    step = StageRun._step

    def look_then_step(stage: StageRun, batches: Any, waited_s: float) -> dict[str, Any]:
        for place, module in stage.module.named_modules():
            if place.endswith("down_proj") or place.endswith("down_proj.base_layer"):
                module.register_forward_hook(lambda *call: seen.update((call[1][0].dtype, call[2].dtype)))
        return step(stage, batches, waited_s)

    monkeypatch.setattr(StageRun, "_step", look_then_step)
    values = lora_values(base, name, quantization=scheme, precision="bfloat16")
    values["stages"][0]["max_steps"] = 3
    run(values)
    assert seen == {torch.bfloat16}
    curve = losses(base / name)
    assert curve[3] < curve[1]


def test_a_quantized_folder_is_trained_as_it_is(base: Path) -> None:
    audioflamingo.quantize(load(base / "wide"), "int8").save_pretrained(base / "int8-folder")
    for file in (base / "wide").iterdir():
        if not (base / "int8-folder" / file.name).exists() and file.suffix != ".safetensors":
            (base / "int8-folder" / file.name).write_bytes(file.read_bytes())
    values = lora_values(base, "from-int8", model=str(base / "int8-folder"))
    run(values)
    run(lora_values(base, "while-loading", quantization="int8"))
    assert losses(base / "from-int8") == pytest.approx(losses(base / "while-loading"), rel=1e-4)
    values["stages"] = [{"learning_rates": {"projector": 1e-2, "lora": 1e-2}, "max_steps": 2}]
    with pytest.raises(ConfigError, match=r"is quantized \(int8\); train lora alone"):
        run({**values, "output_dir": str(base / "refused")})
    with pytest.raises(ConfigError, match=r"quantization: int4 freezes .* leave projector out"):
        build(TrainingConfig, {**values, "quantization": "int4"})


def test_the_merged_model_equals_the_adapted_one(base: Path) -> None:
    result = run(lora_values(base, "merged", lora={"rank": 4, "merge": True}))
    model = load(base / "wide")
    model.load_adapter(result.last_dir / "adapter", "own")
    with model.use_adapter("own"):
        own = logits(model)
    torch.testing.assert_close(logits(load(result.last_dir)), own, atol=1e-4, rtol=1e-4)


def test_the_adapter_for_vllm_names_its_modules(base: Path) -> None:
    """vLLM takes what is behind `base_model.model.` for the name of a module, and says nothing of one that it lacks.

    Its language model lies at `language_model`, as in the files of a checkpoint; it takes no `modules_to_save`.
    """
    result = run(lora_values(base, "vllm", lora={"rank": 4, "layers_to_transform": [1]}))
    folder = result.last_dir / "adapter_vllm"
    tensors = load_file(folder / "adapter_model.safetensors")
    targets = LoraSettings().target_modules
    stored = {name.removesuffix(".weight") for name in load_file(base / "wide" / "model.safetensors")}
    layers = {
        name
        for name in stored
        if name.startswith("language_model.model.layers.1.") and name.endswith(tuple(targets))
    }
    assert len(layers) == len(targets)
    assert tensors.keys() == {
        f"base_model.model.{name}.lora_{half}.weight" for name in layers for half in "AB"
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert config["target_modules"] == sorted(targets)
    assert (folder / "README.md").exists()
    model = load(base / "wide")
    for name in ("adapter", "adapter_vllm"):
        model.load_adapter(result.last_dir / name, name)
    plain, found = logits(model), []
    for name in ("adapter", "adapter_vllm"):
        with model.use_adapter(name):
            found.append(logits(model))
    assert torch.equal(*found)
    assert not torch.equal(plain, found[0])


def test_a_projector_trained_beside_the_adapter_is_saved_in_it(base: Path) -> None:
    """It was lost unless the whole model was saved too. In peft on transformers it is one of `modules_to_save`."""
    peft = pytest.importorskip("peft", reason="needs peft")
    values = lora_values(base, "beside", lora={"rank": 4, "merge": True})
    values["stages"] = [{"learning_rates": {"lora": 1e-2, "projector": 1e-2}, "max_steps": 4}]
    result = run(values)
    whole = load(result.last_dir)
    before, after = (
        load_file(base / "wide" / "model.safetensors"),
        load_file(result.last_dir / "model.safetensors"),
    )
    assert not torch.equal(*(w["multi_modal_projector.linear_1.weight"] for w in (before, after)))
    ours = load(base / "wide")
    ours.load_adapter(result.last_dir / "adapter", "own")
    theirs = peft.PeftModel.from_pretrained(tiny_reference(**WIDTHS), result.last_dir / "adapter")
    with ours.use_adapter("own"):
        torch.testing.assert_close(logits(ours), logits(whole), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(theirs), logits(whole), atol=5e-4, rtol=1e-3)
    assert theirs.peft_config["default"].base_model_name_or_path == str(base / "wide")
    assert not (
        result.last_dir / "adapter_vllm"
    ).exists()  # vLLM refuses `modules_to_save`: take the merged model


def test_optimizer_state_in_8_bits_resumes_to_the_same_losses(base: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    values = lora_values(base, "eight", optimizer="adamw_8bit", lora={"rank": 64}, checkpoint_every_steps=5)
    run(values)
    curve = losses(base / "eight")
    assert curve[12] < 0.9 * curve[1]
    folder = base / "eight-again"
    run({**values, "output_dir": str(folder)}, fresh=True)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    for file in newest.iterdir():  # as if the run had stopped after step 10
        file.unlink()
    newest.rmdir()
    kept = list_checkpoints(folder / "checkpoints")[-1]
    state = torch.load(kept / "tensors.pt", weights_only=True)["optimizer"]["state"]
    moments = [s["__bnb_optimizer_quant_state__"]["state1"] for s in state.values()]
    assert {moment.dtype for moment in moments if moment.numel() >= 4096} == {torch.uint8}
    assert run({**values, "output_dir": str(folder)}).step == 12
    assert losses(folder) == curve


def test_optimizers_that_the_machine_lacks(base: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="paged_adamw_8bit needs a CUDA GPU, this run is on cpu"):
        run(lora_values(base, "paged", optimizer="paged_adamw_8bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"audioflamingo\[train-8bit\]"):
        run(lora_values(base, "absent", optimizer="adamw_8bit"))
