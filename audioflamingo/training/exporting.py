"""From the module in training to folders that `from_pretrained`, `load_adapter`, peft and vLLM load."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from audioflamingo.checkpoint.adapter_folders import ADAPTER_CONFIG, ADAPTER_FILES
from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.checkpoint.weights import hub_name
from audioflamingo.files import AtomicFolder, to_json, write_text
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.quantization.layers import PackedWeight
from audioflamingo.quantization.quantize_model import packed_layers
from audioflamingo.quantization.schemes import with_quantization
from audioflamingo.training.parts import Adapter, part_of
from audioflamingo.training.training_config import LoraSettings

ADAPTER_FOLDER = "adapter"
VLLM_FOLDER = "adapter_vllm"
BASE_LAYER = ".base_layer"
# Parts that are trained beside an adapter are saved in it, whole: peft's `modules_to_save`.
_MODULES = {"encoder": "audio_tower", "projector": "multi_modal_projector"}


def export(
    folder: Path,
    module: nn.Module,
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    *,
    is_main_process: bool,
    dtype: torch.dtype | None,
    notes: dict[str, Any],
    adapter: Adapter | None = None,
    trained_parts: Iterable[str] = (),
) -> None:
    """Saves model, processor and, with LoRA, the adapter; all processes call it, the main one writes.

    With LoRA the weights are saved only if the settings ask to merge; the adapter alone is small, and is there a second
    time for vLLM, which takes no parts that were trained beside it. A quantized base is
    merged as what its integers stand for, which is what was trained on: the result is a float model.

    Args:
        folder: where to.
        module: the trainer's module, wrapped or not.
        model: for its configuration.
        processor: saved beside it.
        is_main_process: of this process.
        dtype: of the saved weights; None keeps theirs.
        notes: written to `training.json`.
        adapter: LoRA layers, if the model has some.
        trained_parts: of the run; those beside the adapter are saved with it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    if not is_main_process:
        return
    weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    folder.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        save_adapter(folder / ADAPTER_FOLDER, weights, adapter, trained_parts)
        if not set(_MODULES) & set(trained_parts):
            save_for_vllm(folder / VLLM_FOLDER, weights, adapter)
    if adapter is None or adapter.settings.merge:
        layers = packed_layers(model)
        config = with_quantization(model.config, None) if layers else model.config
        plain = build_empty(type(model), config)
        settings = None if adapter is None else adapter.settings
        plain.load_state_dict(plain_weights(weights, layers, settings, dtype or model.dtype), assign=True)
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_text(folder / "training.json", to_json(notes))


def save_adapter(
    folder: Path, weights: dict[str, Tensor], adapter: Adapter, trained_parts: Iterable[str] = ()
) -> None:
    """Writes a folder of peft: the adapter, and the parts that were trained beside it.

    Args:
        folder: where to; what it held is replaced as a whole.
        weights: by the names of the model in training.
        adapter: its layers.
        trained_parts: of the run.
    """
    beside = [part for part in _MODULES if part in trained_parts]
    own = {}
    for name, tensor in weights.items():
        if ".lora_" in name or part_of(name) in beside:
            own[f"base_model.model.{name.replace('.default.weight', '.weight')}"] = tensor.contiguous()
    modules = [_MODULES[part] for part in beside] or None
    _write_adapter(folder, own, _adapter_config(adapter) | {"modules_to_save": modules})


def save_for_vllm(folder: Path, weights: dict[str, Tensor], adapter: Adapter) -> None:
    """Writes a folder of peft with vLLM's names: its language model is a causal one inside, as in a checkpoint's files.

    With peft's own names vLLM would read the adapter without an error and use none of it.

    Args:
        folder: where to; what it held is replaced as a whole.
        weights: by the names of the model in training.
        adapter: its layers.
    """
    own = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            stored = hub_name(name.replace(".default.weight", ".weight"))
            own[f"base_model.model.{stored}"] = tensor.contiguous()
    targets = sorted(adapter.settings.target_modules)
    _write_adapter(
        folder, own, _adapter_config(adapter) | {"modules_to_save": None, "target_modules": targets}
    )


def _adapter_config(adapter: Adapter) -> dict[str, Any]:
    config: Any = copy.copy(adapter.peft_model.peft_config["default"])
    config.inference_mode = True
    return {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}


def _write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    with AtomicFolder(folder) as files:
        files.write(ADAPTER_FILES[0], partial(_write, save(tensors, metadata={"format": "pt"})))
        files.write(ADAPTER_CONFIG, partial(_write, to_json(config).encode()))


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


@torch.no_grad()
def plain_weights(
    weights: dict[str, Tensor],
    layers: dict[str, PackedWeight],
    lora: LoraSettings | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The weights of a model without adapter layers and integers: `W + alpha / rank * B A`, one at a time.

    Args:
        weights: by the names of the model in training; they stay as they are.
        layers: its quantized layers by name.
        lora: of its adapter layers; None where there are none.
        dtype: of the result. Sums are float32.
    """

    def adapted(weight: Tensor, module: str) -> Tensor:
        down, up = (weights.get(f"{module}.lora_{half}.default.weight") for half in "AB")
        if lora is None or down is None or up is None:
            return weight.to(dtype)
        return (weight.float() + lora.alpha / lora.rank * (up.float() @ down.float())).to(dtype)

    plain = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        if ".lora_" not in name and (module not in layers or leaf == "bias"):
            module = module.removesuffix(BASE_LAYER)
            plain[f"{module}.{leaf}"] = adapted(tensor, module) if leaf == "weight" else tensor.to(dtype)
    for name, layer in layers.items():
        module = name.removesuffix(BASE_LAYER)
        plain[f"{module}.weight"] = adapted(layer.dequantize(), module)
    return plain
