"""Adapter folders for tests: made by peft on transformers' model, and edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LANGUAGE_MODEL = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)|mlp\.(gate|up|down))_proj"


def save_adapter(folder: Path, reference: Any, seed: int = 0, **changes: Any) -> Any:
    """Writes a LoRA adapter with random weights; returns peft's model, on which it was made."""
    import peft

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_MODEL, "init_lora_weights": False}
    model = peft.get_peft_model(reference, peft.LoraConfig(**{**settings, **changes})).eval()
    model.save_pretrained(str(folder))
    return model


def edit_adapter(folder: Path, change: Any) -> None:
    """Changes the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_adapter_config(folder: Path, **changes: Any) -> None:
    """Changes the settings of an adapter."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
