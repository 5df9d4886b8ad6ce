"""Quantizes a model that is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.quantization.calibration import measure_inputs
from audioflamingo.quantization.layers import PackedWeight, QuantizedEmbedding, empty_layer
from audioflamingo.quantization.schemes import (
    LayerFormat,
    QuantizationConfig,
    as_config,
    read_quantization,
    with_quantization,
)

Model = TypeVar("Model", bound=Any)
FLOAT_KEY = "unquantized_modules"


@torch.no_grad()
def quantize(
    model: Model,
    scheme: str | QuantizationConfig,
    *,
    group_size: int | None = None,
    output_bits: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Model:
    """Quantizes the linear layers and the token embeddings of a model, in place and layer by layer.

    The quantized model runs on the CPU, or on a GPU once it is moved there. Its weights cannot be trained, adapters on
    it can: its remaining parameters no longer ask for gradients.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration` on the CPU.
        scheme: `"int8"`: weights by channel, activations by token. `"int4"`: the language model's layers in 4 bit
            groups, the rest in int8. `"fp8"`: float8 by channel, embeddings and output layer in int8; for GPUs.
        group_size: inputs that share a scale in `"int4"`: 32, 64 or 128. By default `DEFAULT_GROUP_SIZE`, or less in
            layers that it does not divide.
        output_bits: of the output layer, 8 (by default) or 4 (in groups of 32): with 4, where the vocabulary is large,
            a token takes less time, and its errors reach the logits undamped.
        calibration: prompts as the processor returns them. They are answered once, and the rounding then follows what
            each layer got to see (see `calibration`, `smoothing`).

    Returns:
        The model.

    Raises:
        ArgumentError: an unknown scheme, a group size that does not divide a layer's inputs, a model that is quantized
            already or holds adapters, or weights that are NaN.
        DeviceError: the model is not on the CPU.
    """
    config = as_config(scheme, group_size, calibration is not None, output_bits)
    _check_model(model)
    if group_size is not None:
        config.check_divides(model)
    formats = layer_formats(model, config)
    measured = {} if calibration is None else measure_inputs(model, calibration)
    for name, format_ in formats.items():
        module: Any = model.get_submodule(name)
        layer = empty_layer(module, format_)
        layer.fill(module.weight, name, measured.get(name))
        model.set_submodule(name, layer)
    model.requires_grad_(False)
    model.config = model.model.config = with_quantization(model.config, config)
    return model


def layer_formats(model: Any, config: QuantizationConfig) -> dict[str, LayerFormat]:
    """The modules that are quantized, by name, and how.

    A model's `config.json` may name modules that stay as they are under `FLOAT_KEY`, by the beginnings of their names.
    """
    kept = tuple(model.config.extra.get(FLOAT_KEY, ()))
    found = (
        (name, config.layer_format(name, module))
        for name, module in model.named_modules()
        if not name.startswith(kept)
    )
    return {name: format_ for name, format_ in found if format_ is not None}


def replace_layers(model: Any, config: QuantizationConfig) -> None:
    """Puts empty quantized layers in the place of a model's own, for a model whose weights are loaded next."""
    for name, format_ in layer_formats(model, config).items():
        model.set_submodule(name, empty_layer(model.get_submodule(name), format_))
    model.requires_grad_(False)


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model, those of quantized layers counted as weights, not as bytes."""
    packed = sum(math.prod(layer.shape) for layer in packed_layers(model).values())
    return sum(parameter.numel() for parameter in model.parameters()) + packed


def set_embedding_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Says in which dtype quantized embeddings are looked up, which no tensor of theirs shows."""
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.dtype = dtype


def _check_model(model: Any) -> None:
    if read_quantization(model.config) is not None:
        raise ArgumentError(
            f"the model is quantized already ({read_quantization(model.config)}); load the original to change that."
        )
    if any("lora_" in name or ".base_layer" in name for name, _ in model.named_modules()):
        raise ArgumentError(
            "the model holds adapter layers; merge them first: model = peft_model.merge_and_unload()."
        )
    if len(getattr(model, "adapters", ())):
        raise ArgumentError("adapters are loaded beside the model; load them again once it is quantized.")
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    devices = sorted({str(tensor.device) for tensor in tensors if tensor.device.type != "cpu"})
    if devices:
        raise DeviceError(f"the model is on {devices[0]}, models are quantized on the CPU: model.to('cpu').")
