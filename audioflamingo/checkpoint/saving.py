"""Writes a checkpoint folder that transformers, vLLM and this package read.

Hub layout, safetensors, shards, configs. Tensors are written one at a time, so saving takes the memory of the largest
tensor. File format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from audioflamingo.checkpoint.weights import (
    CONFIG_FILE,
    FLOAT8,
    FLOAT_DTYPES,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    PACKED_DTYPE,
    SAVE_ID,
    SHARD_PATTERN,
    WEIGHTS_FILE,
    fits_float8,
    hub_name,
    is_packed,
    shorten,
)
from audioflamingo.errors import ArgumentError, CheckpointError
from audioflamingo.files import AtomicFolder, to_json

_FLOAT_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
_DTYPE_NAMES = {**_FLOAT_NAMES, torch.uint8: PACKED_DTYPE, torch.float8_e4m3fn: FLOAT8}
_DATA_ALIGNMENT = (
    64  # bytes: packed integers come first in a file, and kernels read them in lines of this size
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, **{prefix: 1000 ** (n + 1) for n, prefix in enumerate("kmgt")}}
_UNITS |= {prefix + "i": 1024 ** (n + 1) for n, prefix in enumerate("kmgt")}


@dataclass
class Shard:
    """One weight file to write: its name, and the tensors by their saved names."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_bytes: int = 0


def parse_size(size: int | str) -> int:
    """Reads a size in bytes: a number, or text such as `"5GB"` (10^9 bytes) or `"5GiB"` (2^30 bytes).

    Raises:
        ArgumentError: not a size, or not positive.
    """
    num_bytes = 0
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        num_bytes = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    elif isinstance(size, int) and not isinstance(size, bool):
        num_bytes = size
    if num_bytes < 1:
        raise ArgumentError(
            f"max_shard_size must be a number of bytes or a text such as '5GB', got {size!r}."
        )
    return num_bytes


def hub_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the model's tensors to the hub layout.

    Raises:
        CheckpointError: a tensor without values (offloaded), without a name in the layout, or of a dtype that
            is neither a float nor that of a quantized layer.
    """
    offloaded = [name for name, tensor in state.items() if tensor.is_meta]
    if offloaded:
        raise CheckpointError(
            f"cannot save: {len(offloaded)} tensors are offloaded and not in memory ({shorten(offloaded)}). "
            "Load the model with device_map='cpu' and save that."
        )
    odd = [
        f"{name} ({tensor.dtype})"
        for name, tensor in state.items()
        if tensor.dtype not in ((torch.uint8,) if is_packed(name) else _FLOAT_NAMES)
    ]
    if odd:
        raise CheckpointError(f"cannot save tensors that are not floating point: {shorten(odd)}.")
    named = {hub_name(name): tensor for name, tensor in state.items()}
    assert None not in named  # the caller checked the names
    return {name: tensor for name, tensor in named.items() if name is not None}


def smallest_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What tensors are saved as: float16 matrices that float8 holds exactly in float8, others as they are."""
    return {
        name: tensor.to("meta", torch.float8_e4m3fn) if fits_float8(tensor) else tensor
        for name, tensor in tensors.items()
    }


def plan_shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[Shard]:
    """Fills shards in order, none above the limit unless a single tensor is."""
    shards = [Shard("")]
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1].tensors and shards[-1].num_bytes + num_bytes > max_shard_bytes:
            shards.append(Shard(""))
        shards[-1].tensors[name] = tensor
        shards[-1].num_bytes += num_bytes
    for number, shard in enumerate(shards, start=1):
        is_only = len(shards) == 1
        shard.name = WEIGHTS_FILE if is_only else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def write_state(
    folder: Path,
    state: Mapping[str, Tensor],
    max_shard_bytes: int,
    config: dict[str, Any],
    generation_config: dict[str, Any],
) -> None:
    """Writes a model's tensors by `write_checkpoint`, each in its smallest exact dtype, changed when it is its turn.

    Raises:
        CheckpointError: see `hub_tensors` and `write_checkpoint`.
    """
    tensors = hub_tensors(state)
    layout = smallest_layout(tensors)
    write_checkpoint(
        folder,
        plan_shards(layout, max_shard_bytes),
        config,
        generation_config,
        read=lambda name: tensors[name].to(layout[name].dtype),
    )


def write_checkpoint(
    folder: Path,
    shards: list[Shard],
    config: dict[str, Any],
    generation_config: dict[str, Any],
    *,
    read: Callable[[str], Tensor] | None = None,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes weights, index and configurations, replacing an earlier checkpoint in one go; other files stay.

    Args:
        folder: where to.
        shards: what goes into which weight file.
        config: content of `config.json`.
        generation_config: content of `generation_config.json`.
        read: gives the tensor of a saved name when it is its turn; those in `shards` then only say shape and dtype.
            Within a file, packed integers come first.
        others: further files to write along, by name.

    Raises:
        CheckpointError: the folder cannot be written to. It then still holds what it held before.
    """
    with AtomicFolder(folder) as target:
        for shard in shards:
            fill = partial(
                _fill_shard, shard=shard, save_id=target.save_id, read=read or shard.tensors.__getitem__
            )
            target.write(shard.name, fill)
        if len(shards) > 1:
            metadata = {"total_size": sum(shard.num_bytes for shard in shards), SAVE_ID: target.save_id}
            weight_map = {name: shard.name for shard in shards for name in shard.tensors}
            _write_json(target, INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
        _write_json(target, GENERATION_CONFIG_FILE, generation_config)
        _write_json(target, CONFIG_FILE, config)
        for name, content in (others or {}).items():
            _write_bytes(target, name, content)
        target.remove_at_end(
            path
            for path in folder.iterdir()
            if path.name in (WEIGHTS_FILE, INDEX_FILE) or SHARD_PATTERN.fullmatch(path.name)
        )


def _write_json(target: AtomicFolder, name: str, value: dict[str, Any]) -> None:
    _write_bytes(target, name, to_json(value).encode())


def _write_bytes(target: AtomicFolder, name: str, content: bytes) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(content)

    target.write(name, fill)


def _fill_shard(file: BinaryIO, shard: Shard, save_id: str, read: Callable[[str], Tensor]) -> None:
    """Writes one safetensors file: header length, header, data; packed integers and wide dtypes first, which aligns."""
    tensors = sorted(
        shard.tensors.items(),
        key=lambda item: (item[1].dtype != torch.uint8, -item[1].element_size(), item[0]),
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt", SAVE_ID: save_id}}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _DATA_ALIGNMENT)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, tensor in tensors:
        values = read(name).detach().to("cpu").contiguous()
        assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
        file.write(values.reshape(-1).view(torch.uint8).numpy().data)
