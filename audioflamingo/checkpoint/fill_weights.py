"""Builds a model without memory and fills it with the tensors of a checkpoint.

On the CPU and in the stored dtype weights then *are* the mapped file, otherwise they are copied a few tensors at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from audioflamingo.checkpoint.device_map import Placement
from audioflamingo.checkpoint.quantizing import QuantizingReader
from audioflamingo.checkpoint.weights import StoredTensor, is_quantized, read_tensor, shorten
from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.errors import CheckpointError, DeviceError
from audioflamingo.kernels.modules import Linear
from audioflamingo.quantization.quantize_model import replace_layers, set_embedding_dtype
from audioflamingo.quantization.schemes import read_quantization

NUM_READERS = 4  # tensors that are converted or moved at one time


class _SkipInitialization(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` do nothing.

    On the meta device they have nothing to do, but the first of them loads torch's compiler: 2 s and 70 MB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_empty(cls: type, config: AudioFlamingo3Config) -> Any:
    """Builds the model without memory for its weights, which are on the meta device.

    Its layers are quantized ones if the configuration says so.
    """
    quantization = read_quantization(config)
    with torch.device("meta"), _SkipInitialization():
        model = cls(config)
    if quantization is not None:
        replace_layers(model, quantization)
    return model


def fill_from_files(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    placement: Placement,
    keep_float16: bool = False,
) -> None:
    """Fills the model, file by file and a few tensors at a time.

    With `keep_float16` the language model's linear layers keep float16 weights as they are stored.

    `to` returns the mapped tensor itself when neither device nor dtype changes. The mapping is private:
    writing to a weight later copies the touched pages and leaves the file alone.
    """
    by_path: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, tensor in stored.items():
        by_path.setdefault(tensor.path, []).append((name, tensor))
    try:
        for path, tensors in by_path.items():
            with (
                safe_open(path, framework="pt", device="cpu") as file,
                ThreadPoolExecutor(NUM_READERS) as pool,
            ):

                def read(item: tuple[str, StoredTensor], file: Any = file) -> torch.Tensor:
                    name, tensor = item
                    value = read_tensor(file, tensor.key)
                    if is_quantized(name) or (keep_float16 and _keeps_float16(model, name, value)):
                        return value.to(placement.device_of(name))
                    return value.to(placement.device_of(name), dtype)

                for (name, _), value in zip(tensors, pool.map(read, tensors), strict=True):
                    _assign(model, name, value)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; download the file again.") from error
    except torch.OutOfMemoryError as error:
        needed = sum(math.prod(tensor.shape) for tensor in stored.values()) * dtype.itemsize
        raise DeviceError(
            f"the weights take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, more than the device has "
            f"free; pass a smaller dtype, several devices, or device_map='cpu'. ({error})"
        ) from error
    empty = [
        name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta
    ]
    if empty:
        raise CheckpointError(f"these tensors of the model were not filled: {shorten(empty)}.")
    set_embedding_dtype(model, dtype)


def _keeps_float16(model: nn.Module, name: str, value: torch.Tensor) -> bool:
    """Of what is read for every token: the audio, read once for many positions, is faster with wide weights."""
    is_read_often = name.startswith(("model.language_model.", "lm_head."))
    module, _, leaf = name.rpartition(".")
    is_weight = leaf == "weight" and type(model.get_submodule(module)) is Linear
    return is_read_often and is_weight and value.dtype == torch.float16


def fill_quantizing(
    model: nn.Module, stored: Mapping[str, StoredTensor], dtype: torch.dtype, placement: Placement
) -> None:
    """Fills a quantized model from a checkpoint that is not, tensor by tensor; `dtype` is that of the rest."""
    reader = QuantizingReader(model, stored, dtype)
    for name in model.state_dict():
        _assign(model, name, reader.read(name).to(placement.device_of(name)))
    set_embedding_dtype(model, dtype)


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer that is on the meta device."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=module.get_parameter(leaf).requires_grad)
