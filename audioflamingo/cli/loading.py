"""Loads the model and the processor that a command asks for."""

from __future__ import annotations

import time
from typing import Any

from audioflamingo.cli.options import Dtype, Quantization
from audioflamingo.cli.terminal import Terminal


def load(
    model: str, device: str, dtype: Dtype, verbose: bool = False, quantization: Quantization | None = None
) -> tuple[Any, Any]:
    """Loads a model and its processor.

    Args:
        model: the name of the built-in model, a hub id or a folder.
        device: `"auto"` or a device of torch.
        dtype: of the weights.
        verbose: say what is loaded, where, and how long it took.
        quantization: make the weights smaller while loading.

    Raises:
        CheckpointError, ConfigError, DeviceError: it cannot be loaded.
    """
    import torch

    from audioflamingo.hub import resolve_folder
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
    from audioflamingo.processor import AudioFlamingo3Processor
    from audioflamingo.quantization import num_parameters, read_quantization

    start = time.perf_counter()
    folder = resolve_folder(model)
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    is_cpu = device == "cpu" or (
        device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    )
    loaded = AudioFlamingo3ForConditionalGeneration.from_pretrained(
        folder,
        dtype=_choose_dtype(folder, dtype, is_cpu),
        device_map=device,
        quantization=None if quantization is None else quantization.value,
    )
    if verbose:
        form = read_quantization(loaded.config) or loaded.dtype
        Terminal.say(
            f"loaded {model} ({num_parameters(loaded) / 1e6:.1f} M parameters, {form}) on {loaded.device} in "
            f"{time.perf_counter() - start:.1f} s"
        )
    return loaded, processor


def _choose_dtype(folder: Any, dtype: Dtype, is_cpu: bool) -> str:
    """float16 is slow and narrow on a CPU: its weights are widened there, unless it is asked for by name."""
    if dtype is not Dtype.AUTO or not is_cpu:
        return str(dtype.value)
    from audioflamingo.config import AudioFlamingo3Config

    if not (folder / "config.json").exists():  # NVIDIA's original folders
        return "auto"
    return "float32" if AudioFlamingo3Config.from_pretrained(folder).dtype == "float16" else "auto"
