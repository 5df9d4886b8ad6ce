"""Adapter folders: those of peft, and NVIDIA's (`think/`, `stage35/`) with `non_lora_trainables.bin` beside them.

Strict as everything that is loaded here: each tensor of the folder is used, or an error names it. That matters more
than elsewhere, because an adapter of which nothing fits looks like one that was never trained.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from audioflamingo.checkpoint.weights import PREFIXES, shorten
from audioflamingo.errors import CheckpointError
from audioflamingo.files import read_json
from audioflamingo.network.adapters import AdapterWeights, Lora
from audioflamingo.quantization.layers import PackedWeight

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
EXTRA_FILE = "non_lora_trainables.bin"
# Settings of peft that change what an adapter does and are not implemented, with the values at which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False,),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin that change the base model's weights too
_LORA_KEY = re.compile(r"(.+)\.lora_(A|B)(?:\.\w+)?\.weight")


def read_adapter(folder: Path, model: nn.Module) -> AdapterWeights:
    """Reads an adapter for a model.

    Raises:
        CheckpointError: there is none, it is damaged, of another kind, or does not fit the model.
    """
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if path is None or not (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder} holds no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_FILES[0]}.")
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(folder, config)
    shapes = _shapes(model)
    lora, other = _sort_keys(path, _read_tensors(path), shapes)
    weights = AdapterWeights(_pair(path, lora, config, shapes))
    if (folder / EXTRA_FILE).exists():
        path = folder / EXTRA_FILE
        extra_lora, extra = _sort_keys(path, _read_tensors(path), shapes)
        if extra_lora:
            raise CheckpointError(f"{path} holds LoRA weights, which belong into {ADAPTER_FILES[0]}.")
        other = {**extra, **other}
    for name, tensor in other.items():
        _add_replaced(path, weights, model, name, tensor)
    if not weights.modules:
        raise CheckpointError(f"the adapter in {folder} changes nothing.")
    return weights


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: peft_type {kind!r} is not implemented; only 'LORA' is."
        )
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral[0]) not in neutral:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: {name} = {config[name]!r} is not implemented; merge the adapter with peft."
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights = {start!r} changes the base model too; convert the adapter "
            "to plain LoRA with peft (save_pretrained(path_initial_model_for_weight_conversion=...))."
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; of a pickled one nothing but tensors is read."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and opening that could run any code: it is not read. Save its state dict "
            "again, with tensors only."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; get the file again.") from error
    if not isinstance(found, dict) or not all(
        isinstance(t, Tensor) and isinstance(k, str) for k, t in found.items()
    ):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(found).__name__}.")
    return found


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the parameters by name, as if nothing were quantized."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            shapes[f"{name}.weight"] = torch.Size(module.shape)
    return shapes


def _sort_keys(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA weights by module, and other tensors by parameter.

    Raises:
        CheckpointError: keys that name nothing in the model, or name the same thing twice.
    """
    lora: dict[str, dict[str, Tensor]] = {}
    other: dict[str, Tensor] = {}
    unknown, doubled = [], []
    for key, tensor in tensors.items():
        match = _LORA_KEY.fullmatch(key)
        stem = (
            match[1] + ".weight"
            if match
            else key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        )
        name = next((found for found in _candidates(stem) if found in shapes), None)
        if name is None:
            unknown.append(f"{key} {list(tensor.shape)}")
        elif match:
            module = lora.setdefault(name.removesuffix(".weight"), {})
            doubled += [key] if match[2] in module else []
            module[match[2]] = tensor
        else:
            doubled += [key] if name in other else []
            other[name] = tensor
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} of {len(tensors)} tensors that name nothing in this model: {shorten(unknown)}. "
            "Is it an adapter of another model?"
        )
    if doubled:
        raise CheckpointError(f"{path} holds the same tensor twice: {shorten(doubled)}.")
    return lora, other


def _candidates(key: str) -> Iterator[str]:
    """Names that a stored key may have in the model: peft's, the hub's and NVIDIA's layouts, wrapped or not."""
    key = key.removeprefix("base_model.model.")
    for rest in dict.fromkeys((key, key.removeprefix("model."))):
        yield rest
        yield f"model.{rest}"
        for part, prefixes in PREFIXES.items():
            inner = rest
            while part and inner.startswith(f"{part}."):
                inner = inner.removeprefix(f"{part}.")
            if part in ("", "llm") or inner != rest:
                yield from (new + inner[len(old) :] for old, new in prefixes if inner.startswith(old))


def _pair(
    path: Path,
    found: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Lora]:
    """LoRA weights in pairs, with their scale."""
    pairs = {}
    for name, halves in found.items():
        if set(halves) != {"A", "B"}:
            raise CheckpointError(f"{path} has lora_{next(iter(halves))} of {name} without the other half.")
        shape = shapes[f"{name}.weight"]
        rank = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise CheckpointError(f"{path.parent / ADAPTER_CONFIG} names no rank and alpha for {name}.")
        down, up = halves["A"], halves["B"]
        wanted = [(rank, shape[-1]), (shape[0], rank)]
        if len(shape) != 2 or [tuple(down.shape), tuple(up.shape)] != wanted:
            raise CheckpointError(
                f"{path}: LoRA of {name} is {list(down.shape)} and {list(up.shape)}, but rank {rank} and this model "
                f"need {list(wanted[0])} and {list(wanted[1])}."
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[name] = Lora(down, up, scale)
    return pairs


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """The entry whose key matches the end of a module's name, as peft has it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _add_replaced(path: Path, weights: AdapterWeights, model: nn.Module, name: str, tensor: Tensor) -> None:
    """Takes over a tensor that stands in place of the model's own, unless it is the model's own."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    shape = (
        module.shape
        if leaf == "weight" and isinstance(module, PackedWeight)
        else module.get_parameter(leaf).shape
    )
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"{path}: {name} is {list(tensor.shape)}, this model needs {list(shape)}.")
    own = module._parameters.get(leaf)
    if own is not None and torch.equal(tensor.to(own.device, own.dtype), own):
        return
    if module_name.endswith("embed_positions"):
        raise CheckpointError(
            f"{path}: {name} differs from the model's; the encoder's positions are never trained."
        )
    weights.replaced.setdefault(module_name, {})[leaf] = tensor
