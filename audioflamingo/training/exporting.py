"""From the module in training to folders that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.files import to_json, write_text
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.parts import Adapter
from audioflamingo.training.training_config import LoraSettings

ADAPTER_FOLDER = "adapter"
BASE_LAYER = ".base_layer."


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
) -> None:
    """Saves model, processor and, with LoRA, the adapter; all processes call it, the main one writes.

    With LoRA the weights are saved only if the settings ask to merge; the adapter alone is small.

    Args:
        folder: where to.
        module: the trainer's module, wrapped or not.
        model: for its configuration.
        processor: saved beside it.
        is_main_process: of this process.
        dtype: of the saved weights; None keeps theirs.
        notes: written to `training.json`.
        adapter: LoRA layers, if the model has some.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    if not is_main_process:
        return
    weights = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    folder.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        own = {f"base_model.model.{name}": tensor for name, tensor in weights.items() if ".lora_" in name}
        adapter.peft_model.save_pretrained(str(folder / ADAPTER_FOLDER), state_dict=own)
        weights = merge_lora(weights, adapter.settings)
    if adapter is None or adapter.settings.merge:
        plain = build_empty(type(model), model.config)
        plain.load_state_dict(
            {name: t if dtype is None else t.to(dtype) for name, t in weights.items()}, assign=True
        )
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_text(folder / "training.json", to_json(notes))


@torch.no_grad()
def merge_lora(weights: dict[str, Tensor], lora: LoraSettings) -> dict[str, Tensor]:
    """Folds adapters into the weights they adapt: `W + alpha / rank * B A`. New tensors; the old stay as they are."""
    merged = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        if BASE_LAYER in name and name.endswith(".weight"):
            stem = name.replace(f"{BASE_LAYER}weight", "")
            down, up = weights[f"{stem}.lora_A.default.weight"], weights[f"{stem}.lora_B.default.weight"]
            change = lora.alpha / lora.rank * (up.float() @ down.float())
            tensor = (tensor.float() + change).to(tensor.dtype)
        merged[name.replace(BASE_LAYER, ".")] = tensor
    return merged
