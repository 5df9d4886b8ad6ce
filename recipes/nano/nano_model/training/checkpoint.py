"""The trained tensors of the built-in model in a file, and back onto a model that was constructed anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from audioflamingo.checkpoint.weights import WEIGHTS_FILE, hub_name
from audioflamingo.files import replacing

CHECKPOINT_FILE = "checkpoint.safetensors"
CONSTRUCTED = ("audio_tower.", "embed_tokens.")  # Whisper's, the same each time
TOKENIZER_KEY = "tokenizer"


def keep(folder: Path, target: Path) -> int:
    """Writes what training changes of the model in a folder, in float16; returns the file's bytes."""
    tensors = {
        name: tensor.half()
        for name, tensor in load_file(folder / WEIGHTS_FILE).items()
        if not any(part in name for part in CONSTRUCTED)
    }
    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", TOKENIZER_KEY: _fingerprint(folder)})
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
    known = {hub_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in load_file(file).items():
        own = known.get(name)
        if own is None or own.shape != tensor.shape:
            raise SystemExit(
                f"{file} holds {name} {tuple(tensor.shape)}, which the model of {folder} has no place for."
            )
        own.copy_(tensor)


def _fingerprint(folder: Path) -> str:
    """Of the tokens and their numbers, however the file is written."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content["model"]["vocab"], sort_keys=True).encode()).hexdigest()
