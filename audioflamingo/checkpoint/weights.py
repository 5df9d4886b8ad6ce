"""The weight files of a checkpoint folder: which there are, what they hold, the model's name of each tensor.

Knows every layout that is read (one table, `PREFIXES`), the safetensors header, and the dtypes that tensors are stored
in; where they go is `checkpoint`'s part. Source of the names: the published checkpoint and NVIDIA's original folders;
file format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from audioflamingo.errors import CheckpointError
from audioflamingo.files import TEMPORARY_PATTERN, read_json

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SAVE_ID = "save_id"  # key in the metadata of shards and index: equal in all files of one save

# Where a stored name begins -> where the model's name begins. "" is the checkpoint folder; the others are
# NVIDIA's. The first entries are the layout that `save_pretrained` writes; the model's own names
# (transformers 5) come second.
HUB_PREFIXES = (
    ("audio_tower.", "model.audio_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (*HUB_PREFIXES, ("model.", "model."), ("lm_head.", "lm_head.")),
    "llm": (("model.", "model.language_model."), ("lm_head.", "lm_head.")),
    "sound_tower": (("", "model.audio_tower."),),
    "sound_mm_projector": (
        ("layers.0.", "model.multi_modal_projector.linear_1."),
        ("layers.2.", "model.multi_modal_projector.linear_2."),
    ),
}
COMPONENTS = tuple(folder for folder in PREFIXES if folder)
OTHER_COMPONENTS = ("vision_tower", "mm_projector", "speech_tower")  # of NVIDIA's other models

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# For storage only: read as float16, which holds all its values, as transformers reads it. A checkpoint whose float8 has
# scales is refused, since these are tensors that no layout knows.
FLOAT8 = "F8_E4M3"
READ_DTYPES = {**FLOAT_DTYPES, FLOAT8: torch.float16}
PACKED_DTYPE = "U8"  # of the tensors `*.packed_*` of a quantized checkpoint, and of no others
MAX_NAMED = 5  # tensors that an error lists before it says "and n more"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file.

    Attributes:
        name: its name in the model; None when no layout knows it.
        key: its name in the file.
        path: the file.
        dtype: safetensors' name of the dtype, for example `"BF16"`.
        shape: its shape.
    """

    name: str | None
    key: str
    path: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileHeader:
    """Header of a safetensors file: the tensors' entries and the free metadata."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]


def read_tensor(file: Any, key: str) -> torch.Tensor:
    """A tensor of an open safetensors file, in one of `READ_DTYPES`."""
    tensor: torch.Tensor = file.get_tensor(key)
    return tensor.half() if tensor.dtype == torch.float8_e4m3fn else tensor


def fits_float8(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a float16 matrix of which float8 holds every value exactly."""
    if tensor.dtype != torch.float16 or tensor.ndim < 2:
        return False
    some = tensor[:1]  # one row tells it nearly always
    return all(torch.equal(part.to(torch.float8_e4m3fn).half(), part) for part in (some, tensor))


def hub_name(name: str) -> str | None:
    """Translates a parameter name of the model to the name it is saved under; None if it has none."""
    return _translate(name, ((ours, stored) for stored, ours in HUB_PREFIXES))


def is_packed(name: str) -> bool:
    """Whether a tensor holds the integers of a quantized layer; the rest of its name says in which format."""
    return name.rpartition(".")[2].startswith("packed_")


def is_quantized(name: str) -> bool:
    """Whether a tensor belongs to a quantized layer and keeps its dtype: integers and their scales."""
    return is_packed(name) or name.endswith(".scales")


def _translate(name: str, prefixes: Iterable[tuple[str, str]]) -> str | None:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def is_component_folder(folder: Path) -> bool:
    """Whether a folder is in NVIDIA's original layout: `llm/`, `sound_tower/` and `sound_mm_projector/`."""
    has_own_weights = any((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))
    return not has_own_weights and all((folder / name).is_dir() for name in COMPONENTS)


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Lists what a checkpoint folder stores, by the model's names, having read the headers only.

    Raises:
        CheckpointError: no weights, weights of another format, a damaged file, an index that does not match
            its shards, files of different saves, tensors that no layout knows, that are no floats, or that
            come twice.
    """
    if is_component_folder(folder):
        others = [name for name in OTHER_COMPONENTS if (folder / name).is_dir()]
        if others:
            raise CheckpointError(
                f"{folder} holds {', '.join(others)}: it is another model than Audio Flamingo 3."
            )
        stored = [tensor for name in COMPONENTS for tensor in _list_folder(folder / name, PREFIXES[name])]
    else:
        stored = _list_folder(folder, PREFIXES[""])
    return _by_name(folder, stored)


def _list_folder(folder: Path, prefixes: Iterable[tuple[str, str]]) -> list[StoredTensor]:
    """Lists the tensors of the weight files that lie directly in `folder`."""
    prefixes = tuple(prefixes)
    paths, index = _weight_files(folder)
    headers = {path: read_header(path) for path in paths}
    _check_one_save(folder, headers, index)
    if index is not None:
        _check_index(folder, headers, index["weight_map"])
    return [
        StoredTensor(_translate(key, prefixes), key, path, entry["dtype"], tuple(entry["shape"]))
        for path, header in headers.items()
        for key, entry in header.tensors.items()
    ]


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Any] | None]:
    """Finds the weight files of one folder, and the index if they are shards."""
    single, index_path = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.exists() and index_path.exists():
        raise CheckpointError(
            f"{folder} holds both {WEIGHTS_FILE} and {INDEX_FILE}, so two sets of weights; remove the older "
            "one."
        )
    if single.exists():
        return [single], None
    if index_path.exists():
        index = _read_index(index_path)
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
        absent = [path.name for path in paths if not path.exists()]
        if absent:
            raise CheckpointError(
                f"{index_path} names {shorten(absent)}, which {'is' if len(absent) == 1 else 'are'} not "
                "there; download or copy the folder again."
            )
        return paths, index
    lone = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter_")]
    if len(lone) == 1 and not SHARD_PATTERN.fullmatch(lone[0].name):
        return lone, None
    raise CheckpointError(_explain_no_weights(folder, lone))


def _explain_no_weights(folder: Path, safetensors: list[Path]) -> str:
    """Says why a folder without `model.safetensors` and without an index cannot be loaded."""
    if safetensors:
        return (
            f"{folder} holds {shorten([path.name for path in safetensors])} but no {INDEX_FILE} that says "
            "what belongs together; download or copy the folder again."
        )
    if (folder / "adapter_config.json").exists():
        return (
            f"{folder} holds an adapter, not a model: load the base model, then "
            "`peft.PeftModel.from_pretrained(model, folder)`."
        )
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} holds its weights as {shorten(pickles)} only. Pickled files can run any code when "
            "opened, so they are not read: convert them with `safetensors.torch.save_file(torch.load(path, "
            "weights_only=True), ...)`."
        )
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if 0 < len(missing) < len(COMPONENTS):
        return f"{folder} looks like NVIDIA's original layout but has no folder {', '.join(missing)}."
    return f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}."


def _read_index(path: Path) -> dict[str, Any]:
    """Reads and checks `model.safetensors.index.json`."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'; download or copy the folder again.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{path} places {key!r} in {name!r}, which is not the name of a file beside it."
            )
    return index


def _check_index(folder: Path, headers: Mapping[Path, FileHeader], weight_map: Mapping[str, str]) -> None:
    absent = [
        f"{key} ({name})" for key, name in weight_map.items() if key not in headers[folder / name].tensors
    ]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_FILE} promises tensors that its shards do not hold: {shorten(absent)}; "
            "download or copy the folder again."
        )


def _check_one_save(folder: Path, headers: Mapping[Path, FileHeader], index: dict[str, Any] | None) -> None:
    """Refuses a folder whose files come from more than one `save_pretrained`."""
    save_ids = {path.name: header.metadata.get(SAVE_ID) for path, header in headers.items()}
    metadata = {} if index is None else index.get("metadata")
    if isinstance(metadata, dict) and SAVE_ID in metadata:
        save_ids[INDEX_FILE] = metadata[SAVE_ID]
    if len(set(save_ids.values())) > 1:
        raise CheckpointError(
            f"{folder} mixes files of {len(set(save_ids.values()))} saves ({shorten(sorted(save_ids))}): a "
            "save or a copy into it was interrupted. Save the model again, or copy the whole folder again."
        )
    left_over = (TEMPORARY_PATTERN.fullmatch(path.name) for path in folder.glob(".saving-*"))
    if any(match and match["save_id"] in save_ids.values() for match in left_over):
        raise CheckpointError(
            f"{folder} holds a save that was interrupted while its files were put in place; save the model "
            "again."
        )


def _by_name(folder: Path, stored: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Indexes tensors by the model's names; refuses unknown, doubled and non-float ones."""
    by_name: dict[str, StoredTensor] = {}
    unknown, doubled, no_floats = [], [], []
    for tensor in stored:
        if tensor.dtype not in ((PACKED_DTYPE,) if is_packed(tensor.key) else READ_DTYPES):
            no_floats.append(f"{tensor.key} ({tensor.dtype})")
        elif tensor.name is None:
            unknown.append(f"{tensor.key} {list(tensor.shape)}")
        elif tensor.name in by_name:
            other = by_name[tensor.name]
            doubled.append(f"{tensor.key} in {tensor.path.name} and {other.key} in {other.path.name}")
        else:
            by_name[tensor.name] = tensor
    if no_floats:
        raise CheckpointError(
            f"{folder} stores tensors of a dtype that they cannot have, as models quantized elsewhere do: "
            f"{shorten(no_floats)}. Load the original, unquantized checkpoint."
        )
    if unknown:
        raise CheckpointError(
            f"{folder} stores tensors that are no part of Audio Flamingo 3: {shorten(unknown)}."
        )
    if doubled:
        raise CheckpointError(
            f"{folder} stores the same tensor twice: {shorten(doubled)}; remove one of the files."
        )
    return by_name


def check_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, torch.Size]
) -> None:
    """Compares the stored tensors with the model's.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; some of each are named.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in stored]
    unexpected = [f"{t.key} {list(t.shape)}" for name, t in stored.items() if name not in expected]
    misshapen = [
        f"{stored[name].key} is {list(stored[name].shape)}, needs {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != tuple(shape)
    ]
    problems = [
        f"{len(found)} {kind}: {shorten(found)}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"the tensors in {folder} do not fit its configuration: {'; '.join(problems)}. Check that "
            f"{CONFIG_FILE} belongs to these weights and that the folder is complete."
        )


def read_header(path: Path) -> FileHeader:
    """Reads the header of a safetensors file and checks that the file is as long as it says.

    Raises:
        CheckpointError: the file is a git-lfs pointer, cut off, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            size = path.stat().st_size
            if start == b"version ":
                raise CheckpointError(
                    f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in that folder."
                )
            if size < 8 + length or len(start) < 8 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} ({size} bytes) is cut off or is no safetensors file; download it again."
                )
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for entry in header.values():
            if not isinstance(entry["dtype"], str) or not all(isinstance(n, int) for n in entry["shape"]):
                raise TypeError("dtype or shape is not what it must be")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the header of {path} is damaged ({error}); download the file again."
        ) from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path} is cut off or damaged: {size} bytes in place of {8 + length + end}; get it again."
        )
    return FileHeader(header, metadata)


def shorten(items: list[str]) -> str:
    """Joins the first few items and counts the rest."""
    rest = len(items) - MAX_NAMED
    return ", ".join(items[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
