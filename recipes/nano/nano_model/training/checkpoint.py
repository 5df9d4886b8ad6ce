"""The trained tensors of the built-in model in a file, and back onto a model that was constructed anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHECKPOINT_FILE = "checkpoint.safetensors"
CONSTRUCTED = ("audio_tower.", "embed_tokens.")  # Whisper's, the same each time
TOKENIZER_KEY = "tokenizer"


def keep(folder: Path, target: Path) -> int:
    """Writes what training changes of the model in a folder, in float16; returns the file's bytes."""
    tensors = {
        name: tensor.half()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not any(part in name for part in CONSTRUCTED)
    }
    temporary = target.with_name(f".{target.name}")
    save_file(tensors, temporary, metadata={"format": "pt", TOKENIZER_KEY: _fingerprint(folder)})
    temporary.replace(target)
    return target.stat().st_size


@torch.no_grad()
def lay_over(model: Any, folder: Path, file: Path) -> None:
    """Puts a checkpoint's tensors into a model that was loaded from a folder.

    Raises:
        SystemExit: the checkpoint was made with another vocabulary, or of another shape.
    """
    with safe_open(file, framework="pt") as checkpoint:
        if checkpoint.metadata().get(TOKENIZER_KEY) != _fingerprint(folder):
            raise SystemExit(f"{file} was made with another vocabulary than that of {folder}.")
    known = dict(model.named_parameters())
    for name, tensor in load_file(file).items():
        own = known.get(_own_name(name))
        if own is None or own.shape != tensor.shape:
            raise SystemExit(
                f"{file} holds {name} {tuple(tensor.shape)}, which the model of {folder} has no place for."
            )
        own.copy_(tensor)


def _own_name(name: str) -> str:
    """A parameter's name in the model, by that in a folder."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def _fingerprint(folder: Path) -> str:
    """Of the tokens and their numbers, however the file is written."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content["model"]["vocab"], sort_keys=True).encode()).hexdigest()
