"""`af3 info`: what a checkpoint is, from its configuration and the headers of its files."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from audioflamingo.cli.flags import with_flags
from audioflamingo.cli.model_loading import MODEL_KINDS, MODEL_VARIABLE
from audioflamingo.cli.terminal import Terminal
from audioflamingo.config import AUDIO_TOKENS_PER_S
from audioflamingo.hub import BUILT_IN_MODEL

PARTS = (
    ("audio encoder", "model.audio_tower."),
    ("projector", "model.multi_modal_projector."),
    ("token embeddings", "model.language_model.embed_tokens."),
    ("language model", "model.language_model."),
    ("output layer", "lm_head."),
)
CACHE_MINUTES = 10  # of audio, for which the size of the cache is shown
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@with_flags
def info(
    model: Annotated[
        str,
        typer.Argument(metavar="[MODEL]", envvar=MODEL_VARIABLE, help=MODEL_KINDS),
    ] = BUILT_IN_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    show_template: Annotated[
        bool, typer.Option("--template", help="Print the whole chat template too.")
    ] = False,
) -> None:
    """Show what a model is: architecture, parameters, memory, files, chat template.

    Only the configuration and the headers of the weight files are read. Of a model on the hub that is not
    here yet, the small files are fetched, never the weights.

    \b
    Examples:
      af3 info
      af3 info nvidia/audio-flamingo-3-hf
      af3 info ./checkpoint --json
    """
    facts = collect_facts(model)
    if as_json:
        Terminal.show(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return
    Terminal.show(describe_facts(facts, show_template))


def collect_facts(model: str) -> dict[str, Any]:
    """Everything that `af3 info` shows.

    Raises:
        CheckpointError, ConfigError: there is no such model, or it is damaged or another one.
    """
    from audioflamingo.checkpoint.fill_weights import build_empty
    from audioflamingo.checkpoint.pretrained import read_config, read_generation_config
    from audioflamingo.model import model_class_of
    from audioflamingo.quantization import read_quantization
    from audioflamingo.quantization.schemes import with_quantization
    from audioflamingo.transcription.alignment_heads import read_heads

    folder, has_weights = _find_folder(model)
    config = read_config(folder)
    quantization = read_quantization(config)
    empty = build_empty(model_class_of(config), with_quantization(config, None))
    sizes = {name: parameter.numel() for name, parameter in empty.state_dict().items()}
    parts: Counter[str] = Counter({name: 0 for name, _ in PARTS})
    for name, size in sizes.items():
        parts[next(part for part, prefix in PARTS if name.startswith(prefix))] += size
    total = sum(sizes.values())
    heads = read_heads(read_generation_config(folder, config).extra, config.text_config)
    return {
        "model": model,
        "folder": str(folder),
        "architecture": _architecture(config),
        "parameters": {**parts, "total": total},
        "quantization": None if quantization is None else str(quantization),
        "weight_bytes": {
            **{dtype: total * size for dtype, size in DTYPE_BYTES.items()},
            **_quantized_bytes(config),
        },
        "cache_bytes_per_token": _cache_bytes(config.text_config),
        "stored": _stored(folder, build_empty(model_class_of(config), config)) if has_weights else None,
        "word_times": heads.to_dict() if heads else {},
        "files": _files(folder),
        "chat_template": _template(folder),
    }


def _find_folder(model: str) -> tuple[Path, bool]:
    """The folder, and whether the weights are there; fetches small files only."""
    from audioflamingo.errors import CheckpointError
    from audioflamingo.hub import PROCESSOR_FILES, resolve_folder

    if Path(model).expanduser().is_dir():
        return Path(model).expanduser(), True
    try:
        folder = resolve_folder(model, local_files_only=True)
    except CheckpointError:
        folder = resolve_folder(model, allow_patterns=PROCESSOR_FILES)
    return folder, any(folder.glob("**/*.safetensors"))


def _architecture(config: Any) -> dict[str, Any]:
    audio, text = config.audio_config, config.text_config
    return {
        "model_type": config.model_type,
        "audio_encoder": {
            "mel_bins": audio.num_mel_bins,
            "hidden_size": audio.hidden_size,
            "layers": audio.num_hidden_layers,
            "heads": audio.num_attention_heads,
            "intermediate_size": audio.intermediate_size,
        },
        "language_model": {
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.intermediate_size,
            "vocabulary": text.vocab_size,
            "context": text.max_position_embeddings,
        },
    }


def _cache_bytes(text: Any) -> dict[str, int]:
    """Bytes of keys and values that one token takes."""
    values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return {dtype: values * size for dtype, size in DTYPE_BYTES.items()}


def _quantized_bytes(config: Any) -> dict[str, int]:
    """Bytes of the weights in each scheme that the model's sizes allow, what is not quantized in bfloat16."""
    from audioflamingo.checkpoint.fill_weights import build_empty
    from audioflamingo.checkpoint.weights import is_quantized
    from audioflamingo.errors import ArgumentError
    from audioflamingo.model import model_class_of
    from audioflamingo.quantization import SCHEMES, QuantizationConfig
    from audioflamingo.quantization.schemes import with_quantization

    sizes = {}
    for scheme in SCHEMES:
        try:
            changed = with_quantization(config, QuantizationConfig(scheme))
            state = build_empty(model_class_of(config), changed).state_dict()
        except ArgumentError:
            continue
        other = DTYPE_BYTES["bfloat16"]
        sizes[scheme] = sum(t.nbytes if is_quantized(n) else t.numel() * other for n, t in state.items())
    return sizes


def _stored(folder: Path, empty: Any) -> dict[str, Any]:
    """What the weight files hold, from their headers; checked against the configuration."""
    from audioflamingo.checkpoint.weights import (
        FLOAT8,
        FLOAT_DTYPES,
        check_tensors,
        find_tensors,
        is_component_folder,
        is_quantized,
    )
    from audioflamingo.quantization.quantize_model import packed_layers

    tensors = find_tensors(folder)
    check_tensors(folder, tensors, {name: tensor.shape for name, tensor in empty.state_dict().items()})
    counts: Counter[str] = Counter()
    for key, tensor in tensors.items():
        if not is_quantized(key):
            name = "float8" if tensor.dtype == FLOAT8 else str(FLOAT_DTYPES[tensor.dtype])
            counts[name.removeprefix("torch.")] += math.prod(tensor.shape)
    for layer in packed_layers(empty).values():
        counts[layer.format.name] += math.prod(layer.shape)
    if is_component_folder(folder):
        layout = "NVIDIA's original folders"
    elif any(tensor.key.startswith("model.") for tensor in tensors.values()):
        layout = "transformers 5 in-memory names"
    else:
        layout = "hub layout (as published)"
    return {"layout": layout, "tensors": len(tensors), "parameters_by_dtype": dict(counts)}


def _files(folder: Path) -> dict[str, int]:
    """Bytes of each file of the checkpoint, two levels deep."""
    paths = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in paths if not path.name.startswith(".")
    }


def _template(folder: Path) -> str | None:
    """The chat template that the processor would use, None if the folder has no processor."""
    from audioflamingo.errors import AudioFlamingoError
    from audioflamingo.processor import AutoProcessor

    try:
        template = AutoProcessor.from_pretrained(folder).chat_template
    except AudioFlamingoError:
        return None
    return template if isinstance(template, str) else template.get("default")


def describe_facts(facts: dict[str, Any], show_template: bool) -> str:
    """The facts as text."""
    audio, text = facts["architecture"]["audio_encoder"], facts["architecture"]["language_model"]
    parameters = facts["parameters"]
    lines = [
        f"model      {facts['model']}  ({facts['folder']})",
        f"encoder    {audio['layers']} layers of {audio['hidden_size']}, {audio['heads']} heads, "
        f"{audio['mel_bins']} mel bins",
        f"language   {text['layers']} layers of {text['hidden_size']}, {text['heads']} heads "
        f"({text['key_value_heads']} for keys and values), vocabulary {text['vocabulary']}, "
        f"context {text['context']}",
        *([f"quantized  {facts['quantization']}"] if facts["quantization"] else []),
        "",
        "parameters",
        *(f"  {name:17} {count:>14,}" for name, count in parameters.items()),
        "",
        f"memory       weights   cache for {CACHE_MINUTES} min of audio",
    ]
    for dtype, num_bytes in facts["weight_bytes"].items():
        cache_bytes = facts["cache_bytes_per_token"]
        cache = cache_bytes.get(dtype, cache_bytes["bfloat16"]) * CACHE_MINUTES * 60 * AUDIO_TOKENS_PER_S
        lines.append(f"  {dtype:9} {format_size(num_bytes):>9}   {format_size(cache):>9}")
    stored = facts["stored"]
    lines += ["", f"weights    {_stored_line(stored)}"]
    lines += [f"word times {_word_times_line(facts['word_times'])}", "files"]
    lines += [f"  {name:40} {format_size(size):>9}" for name, size in facts["files"].items()]
    lines += ["", f"chat template: {_template_line(facts['chat_template'], show_template)}"]
    return "\n".join(lines) + "\n"


def _stored_line(stored: dict[str, Any] | None) -> str:
    if stored is None:
        return "not here yet; they are fetched when the model is first used"
    dtypes = ", ".join(
        f"{count / 1e6:,.1f} M {dtype}" for dtype, count in stored["parameters_by_dtype"].items()
    )
    return f"{stored['layout']}, {stored['tensors']} tensors, {dtypes}"


def _word_times_line(found: dict[str, Any]) -> str:
    if not found:
        return "the heads that look at what they write are found when words are first timed"
    heads = ", ".join(f"{layer}.{head}" for layer, head in found["alignment_heads"])
    return f"by heads {heads} (layer.head); {found['alignment_share']:.0%} of their attention is where it should be"


def _template_line(template: str | None, is_whole: bool) -> str:
    if template is None:
        return "none (no processor in this folder)"
    return f"\n{template}" if is_whole else f"{len(template)} characters; --template prints it"


def format_size(num_bytes: int) -> str:
    """Bytes for reading, for example "4.1 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
