"""Which model a command uses, and how it is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from audioflamingo.cli.terminal import Terminal
from audioflamingo.fields import option
from audioflamingo.hub import BUILT_IN_MODEL

if TYPE_CHECKING:
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
    from audioflamingo.processor import AudioFlamingo3Processor

ADAPTER_NAME = "default"
MODEL_VARIABLE = "AF3_MODEL"
MODEL_KINDS = f"{BUILT_IN_MODEL}, a hub id, or a folder."
_MODEL = "Model"


class Dtype(StrEnum):
    """Dtype of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """Scheme of smaller weights."""

    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


@dataclass(frozen=True)
class ModelOptions:
    """A model, where it runs, and the form of its weights."""

    model: str = option(
        BUILT_IN_MODEL,
        "The built-in model, a hub id such as nvidia/audio-flamingo-3-hf, or a folder.",
        short="-m",
        metavar=f"{BUILT_IN_MODEL}|ID|FOLDER",
        envvar=MODEL_VARIABLE,
        group=_MODEL,
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.", group=_MODEL)
    dtype: Dtype = option(
        Dtype.AUTO, "auto: as stored, but computed in float32 in place of float16 on a CPU.", group=_MODEL
    )
    quantization: Quantization | None = option(
        None,
        "Make the weights smaller while loading; `af3 quantize` does it once and for all. On a CPU or one GPU.",
        group=_MODEL,
    )
    compile: bool = option(
        False,
        "Capture decode steps in CUDA graphs: seconds at the first answers, then faster ones. On a GPU only.",
        group=_MODEL,
    )


@dataclass(frozen=True)
class AdaptedModelOptions(ModelOptions):
    """A model, and an adapter of it."""

    adapter: str | None = option(
        None, "Folder of an adapter (LoRA) that answers.", metavar="FOLDER", group=_MODEL
    )


def load(
    options: ModelOptions, is_verbose: bool = False
) -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]:
    """Loads a model and its processor.

    Args:
        options: which, where, and how.
        is_verbose: say what is loaded, where, and how long it took.

    Raises:
        CheckpointError, ConfigError, DeviceError: it cannot be loaded.
    """
    from audioflamingo.hub import resolve_folder
    from audioflamingo.model import AutoModelForConditionalGeneration
    from audioflamingo.processor import AutoProcessor
    from audioflamingo.quantization import num_parameters, read_quantization

    start = time.perf_counter()
    folder = resolve_folder(options.model)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForConditionalGeneration.from_pretrained(
        folder,
        dtype=_choose_dtype(folder, options),
        device_map=options.device,
        quantization=None if options.quantization is None else options.quantization.value,
        compile=options.compile,
        keep_float16=options.dtype is Dtype.AUTO and _is_cpu(options.device),
    )
    if model.device.type == "cuda":
        processor.feature_extractor.device = model.device
    if is_verbose:
        form = read_quantization(model.config) or model.dtype
        Terminal.say(
            f"loaded {options.model} ({num_parameters(model) / 1e6:.1f} M parameters, {form}) on {model.device} in "
            f"{time.perf_counter() - start:.1f} s"
        )
    return model, processor


def load_with_adapter(
    options: AdaptedModelOptions, is_verbose: bool = False
) -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor, str | None]:
    """Loads a model, its processor and an adapter; returns the adapter's name too, None for the model itself."""
    model, processor = load(options, is_verbose)
    if options.adapter is None:
        return model, processor, None
    model.load_adapter(options.adapter, ADAPTER_NAME)
    return model, processor, ADAPTER_NAME


def find_think_adapter(model: str) -> Path | None:
    """The adapter for thinking that comes with a model; None for a model that thinks without one.

    Raises:
        CheckpointError: an Audio Flamingo 3 comes without.
    """
    from audioflamingo.checkpoint.pretrained import read_config
    from audioflamingo.config import MusicFlamingoConfig
    from audioflamingo.errors import CheckpointError
    from audioflamingo.hub import PROCESSOR_FILES, THINK_FOLDERS, resolve_folder

    folder = resolve_folder(
        model, allow_patterns=[*PROCESSOR_FILES, *(f"{name}/*" for name in THINK_FOLDERS)]
    )
    for name in THINK_FOLDERS:
        if (folder / name / "adapter_config.json").exists():
            return folder / name
    if isinstance(read_config(folder), MusicFlamingoConfig):
        return None
    raise CheckpointError(
        f"--think: {model!r} comes without an adapter for it (looked for {' and '.join(THINK_FOLDERS)} in {folder}); "
        "name one with --adapter."
    )


def _choose_dtype(folder: Path, options: ModelOptions) -> str:
    """float16 is slow and narrow on a CPU: float32 is computed there, unless it is asked for by name."""
    if options.dtype is not Dtype.AUTO or not _is_cpu(options.device):
        return options.dtype.value
    from audioflamingo.config import read_model_config

    if not (folder / "config.json").exists():  # NVIDIA's original folders
        return Dtype.AUTO.value
    is_float16 = read_model_config(folder).dtype == "float16"
    return Dtype.FLOAT32.value if is_float16 else Dtype.AUTO.value


def _is_cpu(device: str) -> bool:
    import torch

    has_other = torch.cuda.is_available() or torch.backends.mps.is_available()
    return device == "cpu" or (device == "auto" and not has_other)
