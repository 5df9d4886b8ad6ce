"""From a checkpoint folder to a quantized one, tensor by tensor."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audioflamingo.checkpoint.checks import drop_time_frequencies
from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.checkpoint.pretrained import (
    DEFAULT_SHARD_SIZE,
    config_to_save,
    read_config,
    read_generation_config,
    stored_dtype,
)
from audioflamingo.checkpoint.quantizing import QuantizingReader
from audioflamingo.checkpoint.saving import parse_size, plan_shards, write_checkpoint
from audioflamingo.checkpoint.weights import (
    FLOAT8,
    StoredTensor,
    check_tensors,
    find_tensors,
    hub_name,
    is_quantized,
)
from audioflamingo.errors import ArgumentError, AudioFlamingoWarning, CheckpointError
from audioflamingo.hub import resolve_folder
from audioflamingo.model import AutoModelForConditionalGeneration, model_class_of
from audioflamingo.processor import AutoProcessor
from audioflamingo.quantization.calibration import LayerInputs, measure_inputs
from audioflamingo.quantization.schemes import as_config, read_quantization, with_quantization

Progress = Callable[[int, int], None]


def quantize_checkpoint(
    id_or_path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    scheme: str,
    *,
    group_size: int | None = None,
    output_bits: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> None:
    """Writes the quantized form of a checkpoint, its processor included.

    Takes the memory of one tensor, with calibration that of the whole model. What `folder` held stays until everything
    is written, so a full disk or an interruption leaves it as it was.

    Args:
        id_or_path: a folder or a hub id.
        folder: where to; not the folder of the original.
        scheme: `"int8"`, `"int4"` or `"fp8"`; see `quantize`.
        group_size: see `quantize`.
        output_bits: see `quantize`.
        calibration: see `quantize`.
        max_shard_size: largest weight file, in bytes or as text such as `"5GB"`.
        progress: called with the bytes that are written and those there will be.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or quantized already, or `folder` cannot be written.
        ArgumentError: an unknown scheme, or a group size that does not divide a layer's inputs.
    """
    quantization = as_config(scheme, group_size, calibration is not None, output_bits)
    max_shard_bytes = parse_size(max_shard_size)
    source, target = resolve_folder(id_or_path), Path(folder).expanduser()
    if target.exists() and target.resolve() == source.resolve():
        raise ArgumentError(f"{str(folder)!r} is the original checkpoint; write to another folder.")
    config = read_config(source)
    if read_quantization(config) is not None:
        raise CheckpointError(f"{source} is quantized already ({read_quantization(config)}).")
    stored = drop_time_frequencies(find_tensors(source), config)
    plain = build_empty(model_class_of(config), config)
    check_tensors(source, stored, {name: tensor.shape for name, tensor in plain.state_dict().items()})
    if group_size is not None:
        quantization.check_divides(plain)

    quantized_config = with_quantization(config, quantization)
    model = build_empty(model_class_of(config), quantized_config)
    measured = None if calibration is None else _measure(source, calibration)
    dtype = stored_dtype(config, source, stored)
    reader = QuantizingReader(model, stored, dtype, measured)
    names, tensors = _hub_layout(model.state_dict(), dtype, stored)
    write_checkpoint(
        target,
        plan_shards(tensors, max_shard_bytes),
        config_to_save(quantized_config, dtype),
        read_generation_config(source, config).to_dict(),
        read=_reporting(lambda name: reader.read(names[name]).to(tensors[name].dtype), tensors, progress),
        others=_processor_files(source),
    )


def _measure(source: Path, calibration: Iterable[Mapping[str, Any]]) -> dict[str, LayerInputs]:
    model = AutoModelForConditionalGeneration.from_pretrained(source)
    return measure_inputs(model, calibration)


def _hub_layout(
    state: Mapping[str, Tensor], dtype: torch.dtype, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The model's name of each saved one, and each saved tensor without its values. What is float8 stays so."""
    names, tensors = {}, {}
    for name, tensor in state.items():
        saved = hub_name(name)
        assert saved is not None
        names[saved] = name
        if is_quantized(name):
            tensors[saved] = tensor
        else:
            is_float8 = dtype == torch.float16 and name in stored and stored[name].dtype == FLOAT8
            tensors[saved] = tensor.to(torch.float8_e4m3fn if is_float8 else dtype)
    return names, tensors


def _reporting(
    read: Callable[[str], Tensor], tensors: Mapping[str, Tensor], progress: Progress | None
) -> Callable[[str], Tensor]:
    """`read`, which reports how far it has come before each tensor."""
    if progress is None:
        return read
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0

    def read_and_report(name: str) -> Tensor:
        nonlocal done
        progress(done, total)
        done += tensors[name].nbytes
        return read(name)

    return read_and_report


def _processor_files(source: Path) -> dict[str, bytes]:
    """The files of the processor, in the layout that is written today."""
    try:
        processor = AutoProcessor.from_pretrained(source)
    except CheckpointError as error:
        warnings.warn(
            f"only the model is written, {source} has no processor that can be loaded: {error}",
            AudioFlamingoWarning,
            stacklevel=3,
        )
        return {}
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
