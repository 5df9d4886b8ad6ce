"""Loading and saving: `from_pretrained` and `save_pretrained` of the model.

Loading is strict: every tensor of the folder is used, every parameter of the model is filled, or an error
names what is wrong.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from audioflamingo.checkpoint.adapter_folders import read_adapter
from audioflamingo.checkpoint.checks import check_token_ids, drop_time_frequencies, find_token_id
from audioflamingo.checkpoint.device_map import (
    DeviceMap,
    Placement,
    check_devices,
    connect_devices,
    parse_dtype,
    plan_placement,
)
from audioflamingo.checkpoint.fill_weights import build_empty, fill_from_files, fill_quantizing
from audioflamingo.checkpoint.saving import parse_size, write_state
from audioflamingo.checkpoint.weights import (
    COMPONENTS,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    READ_DTYPES,
    StoredTensor,
    check_tensors,
    find_tensors,
    is_component_folder,
    is_quantized,
    shorten,
)
from audioflamingo.config import AUDIO_TOKEN, AudioFlamingo3Config, GenerationConfig, read_model_config
from audioflamingo.errors import (
    ArgumentError,
    AudioFlamingoWarning,
    CheckpointError,
    ConfigError,
    DeviceError,
    unknown_arguments,
)
from audioflamingo.files import read_json
from audioflamingo.hub import ADAPTER_PATTERNS, resolve_folder
from audioflamingo.kernels.gpu import check_triton, has_triton
from audioflamingo.network.adapters import merge, routed
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.quantization.layers import QUANTIZED_DEVICES
from audioflamingo.quantization.quantize_model import packed_layers
from audioflamingo.quantization.schemes import (
    QuantizationConfig,
    as_config,
    read_quantization,
    with_quantization,
)

DEFAULT_SHARD_SIZE = "5GB"
# Of NVIDIA's parts: where they came from, which is wrong once they are one model.
_COMPONENT_KEYS_DROPPED = {"_name_or_path", "architectures", "auto_map", "transformers_version"}
_QUANTIZATION_ARGUMENTS = {"quantization_config", "load_in_8bit", "load_in_4bit"}
# Of transformers' `from_pretrained`: what changes nothing here (tensors always go one by one to where they belong, no
# code of a checkpoint is run, safetensors files are read), with the value at which it would.
_NO_EFFECT = {"low_cpu_mem_usage": None, "trust_remote_code": None, "use_safetensors": False}
_NOT_IMPLEMENTED = {
    *("adapter_kwargs", "force_download", "from_flax", "from_tf", "gguf_file", "ignore_mismatched_sizes"),
    *("key_mapping", "max_memory", "offload_buffers", "offload_folder", "offload_state_dict"),
    *("output_loading_info", "proxies", "state_dict", "subfolder", "tp_plan", "variant", "weights_only"),
}


class PretrainedAudioFlamingo3(AudioFlamingo3WithHead):
    """The network with `from_pretrained` and `save_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        device_map: DeviceMap | None = None,
        attn_implementation: str | None = None,
        quantization: str | QuantizationConfig | None = None,
        compile: bool = False,
        keep_float16: bool = False,
        config: AudioFlamingo3Config | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        torch_dtype: str | torch.dtype | None = None,
        **unknown: Any,
    ) -> Self:
        """Loads a model from a folder or from the Hugging Face hub.

        Reads the published layout, transformers' in-memory names, and NVIDIA's original folders.

        Args:
            id_or_path: a folder, or a hub id such as `"nvidia/audio-flamingo-3-hf"`.
            dtype: dtype of the weights, for example `"bfloat16"`. None and `"auto"` take what the checkpoint
                says.
            device_map: None for the CPU; a device; `"auto"` for all CUDA devices, else MPS, else the CPU; or
                a dict from module names to devices. More than one device needs the package `accelerate`.
            attn_implementation: `"sdpa"` (the default) or `"eager"`.
            quantization: `"int8"`, `"int4"`, or `"fp8"` for a GPU: quantize while loading, one tensor at a time; the
                model then runs on the CPU or on one GPU (`device_map="auto"` takes the first). A folder that is
                quantized already needs no asking, and refuses another scheme.
            compile: capture decode steps in CUDA graphs, some seconds when they are first needed; then a step waits
                neither for Python nor for its last tokens. Where that is not possible: one warning, and as without.
            keep_float16: with `dtype="float32"`, keep the language model's linear weights in float16 where they are
                stored so: the same answers on a CPU, with half the memory read for each token. Not to train.
            config: used in place of the folder's `config.json`.
            revision: branch, tag or commit of a hub repository.
            token: hub token; None takes the stored login.
            cache_dir: where downloads are kept.
            local_files_only: use what is downloaded already, never the network.
            torch_dtype: older name of `dtype`.
            **unknown: words of transformers that change nothing are taken, others refused.

        Returns:
            The model, in eval mode.

        Raises:
            CheckpointError: the folder is absent, damaged or incomplete, or holds other tensors than the
                model needs.
            ConfigError: it is another model, or one of its settings is not implemented.
            DeviceError: the device is not there, is too small, or cannot run the dtype.
            ArgumentError: an unknown or contradictory argument.
        """
        unknown = {name: value for name, value in unknown.items() if not _has_no_effect(name, value)}
        _refuse_unknown("from_pretrained", unknown, cls.from_pretrained)
        requested_dtype = _read_dtype(dtype, torch_dtype)
        check_devices(device_map)
        if config is not None and type(config) is not cls.config_class:
            raise ArgumentError(
                f"config must be of {cls.config_class.__name__}, got {type(config).__name__}."
            )
        if not isinstance(compile, bool):
            raise ArgumentError(f"compile must be True or False, got {compile!r}.")
        if quantization is not None:
            as_config(quantization)  # a mistake shows before anything is fetched
        folder = resolve_folder(
            id_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        config = read_config(folder, cls.config_class) if config is None else copy.deepcopy(config)
        check_token_ids(folder, config)
        stored = drop_time_frequencies(find_tensors(folder), config)
        model, is_quantizing = _build(cls, folder, config, stored, quantization)
        found_dtype = requested_dtype or stored_dtype(config, folder, stored)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)

        placement = _place(device_map, model, found_dtype)
        if is_quantizing:
            fill_quantizing(model, stored, found_dtype, placement)
        else:
            keep_float16 = keep_float16 and found_dtype == torch.float32
            fill_from_files(model, stored, found_dtype, placement, keep_float16)
        model.config.dtype = _name(found_dtype)
        model.generation_config = read_generation_config(folder, config)
        if placement.is_split:
            connect_devices(model, placement, model.get_input_embeddings())
        model.compiles_steps = compile
        model.eval()
        return model

    def load_adapter(self, path: str | os.PathLike[str], name: str = "default") -> None:
        """Loads an adapter beside the weights, which stay as they are: a folder of peft (LoRA), or NVIDIA's `think/`.

        `generate(adapter=name)` uses it, for all prompts or for some; `use_adapter` for whatever runs in a block.

        Args:
            path: the folder, or a hub id.
            name: what it is called from now on.

        Raises:
            CheckpointError: there is no adapter, it is damaged, or of another model; the message says what is wrong.
            ArgumentError: the name is taken.
        """
        self.adapters.add(
            self, name, read_adapter(resolve_folder(path, allow_patterns=ADAPTER_PATTERNS), self)
        )

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter."""
        self.adapters.remove(self, name)

    def use_adapter(self, name: str | None) -> AbstractContextManager[None]:
        """A context in which every call of the model uses an adapter; None: in which none is used."""
        if name is not None:
            _ = self.adapters[name]
        context: AbstractContextManager[None] = routed([name])
        return context

    def merge_adapter(self, name: str) -> None:
        """Folds an adapter into the weights, so that `save_pretrained` saves a whole model. There is no way back.

        Raises:
            ArgumentError: no such adapter, or the model is quantized.
        """
        merge(self, self.adapters[name])
        self.adapters.remove(self, name)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
        **unknown: Any,
    ) -> None:
        """Saves weights, `config.json` and `generation_config.json`; transformers loads the folder too.

        Nothing of an earlier checkpoint in the folder changes until everything is written, so a failure
        leaves it loadable; files that are not the model's (the processor's) stay. Saving into the folder that
        the model was loaded from works. One process at a time may save into a folder.

        Args:
            folder: where to; made if it is not there.
            max_shard_size: largest weight file, in bytes or as text such as `"5GB"`.
            **unknown: refused.

        Raises:
            CheckpointError: the folder cannot be written to, or the model holds adapter layers or offloaded
                weights.
            ArgumentError: an unknown argument or a size that is none.
        """
        _refuse_unknown("save_pretrained", unknown, self.save_pretrained)
        max_shard_bytes = parse_size(max_shard_size)
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ArgumentError(f"folder must be a path, got {folder!r}.")
        state = self.state_dict()
        _check_complete(state, build_empty(type(self), self.config).state_dict())
        dtype = _most_common((t.dtype, t.numel()) for name, t in state.items() if not is_quantized(name))
        write_state(
            Path(folder).expanduser(),
            state,
            max_shard_bytes,
            config_to_save(self.config, dtype),
            self.generation_config.to_dict(),
        )


def _build(
    kind: type[PretrainedAudioFlamingo3],
    folder: Path,
    config: AudioFlamingo3Config,
    stored: Mapping[str, StoredTensor],
    quantization: str | QuantizationConfig | None,
) -> tuple[Any, bool]:
    """A model without weights that fits the files, and whether those are quantized on the way into it."""
    model = build_empty(kind, config)
    check_tensors(folder, stored, {name: tensor.shape for name, tensor in model.state_dict().items()})
    if read_quantization(config) is not None:
        _check_recorded(folder, config, quantization)
        return model, False
    if quantization is None:
        return model, False
    scheme = as_config(as_config(quantization), is_calibrated=False)
    return build_empty(kind, with_quantization(config, scheme)), True


def _has_no_effect(name: str, value: Any) -> bool:
    """Whether a keyword of transformers' `from_pretrained` asks for nothing that is not done anyway."""
    if name in _NO_EFFECT:
        return value is None or value is not _NO_EFFECT[name]
    return name in _NOT_IMPLEMENTED | _QUANTIZATION_ARGUMENTS and value in (None, False, "", {})


def _refuse_unknown(name: str, unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raises for keywords that `function` does not take; quantization has a message of its own."""
    if not unknown:
        return
    quantization = sorted(_QUANTIZATION_ARGUMENTS & set(unknown))
    if quantization:
        raise ArgumentError(
            f"{name}({quantization[0]}=...) is not implemented; from_pretrained takes quantization='int8' or 'int4'."
        )
    missing = sorted((_NOT_IMPLEMENTED | set(_NO_EFFECT)) & set(unknown))
    if missing and name == "from_pretrained":
        raise ArgumentError(f"{name}({missing[0]}={unknown[missing[0]]!r}) is not implemented; leave it out.")
    parameters = inspect.signature(function).parameters.values()
    raise unknown_arguments(f"{name}()", unknown, (p.name for p in parameters if p.kind is p.KEYWORD_ONLY))


def _read_dtype(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Reads `dtype` or its older name; None if the checkpoint decides."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ArgumentError(f"dtype={dtype!r} contradicts torch_dtype={torch_dtype!r}; pass dtype alone.")
    requested = torch_dtype if dtype is None else dtype
    return None if requested is None or requested == "auto" else parse_dtype(requested)


def read_config(folder: Path, kind: type[AudioFlamingo3Config] | None = None) -> AudioFlamingo3Config:
    """Reads the configuration of a folder in any layout.

    Args:
        folder: the checkpoint.
        kind: the one that it must be; None takes any of the family.
    """
    if is_component_folder(folder):
        if kind not in (None, AudioFlamingo3Config):
            raise ConfigError(
                f"{folder} is in NVIDIA's original layout: load it with AutoModelForConditionalGeneration."
            )
        return _read_component_config(folder)
    if not (folder / CONFIG_FILE).exists() or any((folder / name).is_dir() for name in COMPONENTS):
        find_tensors(folder)  # if the weights are missing too, its error says more
    return read_model_config(folder) if kind is None else kind.from_pretrained(folder)


def _read_component_config(folder: Path) -> AudioFlamingo3Config:
    """Builds the configuration of NVIDIA's original folders from those of their parts."""
    parts = {}
    for name in ("llm", "sound_tower"):
        values = read_json(folder / name / CONFIG_FILE)
        parts[name] = {key: value for key, value in values.items() if key not in _COMPONENT_KEYS_DROPPED}
    values = {"text_config": parts["llm"], "audio_config": parts["sound_tower"]}
    text_dtype = parts["llm"].get("dtype", parts["llm"].get("torch_dtype"))
    audio_token_id = find_token_id(folder / "llm", AUDIO_TOKEN)
    if audio_token_id is not None:
        values["audio_token_id"] = audio_token_id
    try:
        return AudioFlamingo3Config.from_dict({**values, "dtype": text_dtype})
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def read_generation_config(folder: Path, config: AudioFlamingo3Config) -> GenerationConfig:
    """Reads `generation_config.json`; without one, takes the language model's special ids."""
    path = folder / "llm" if is_component_folder(folder) else folder
    path = path / GENERATION_CONFIG_FILE
    if path.exists():
        return GenerationConfig.from_dict(read_json(path))
    ids = {
        name: config.text_config.extra.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return GenerationConfig.from_dict(ids)


def stored_dtype(
    config: AudioFlamingo3Config, folder: Path, stored: Mapping[str, StoredTensor]
) -> torch.dtype:
    """The dtype that the configuration names, else that of most stored weights that are not quantized."""
    most = _most_common(
        (READ_DTYPES[tensor.dtype], math.prod(tensor.shape))
        for name, tensor in stored.items()
        if not is_quantized(name)
    )
    if config.dtype is None:
        return most
    try:
        named = parse_dtype(config.dtype)
    except (ArgumentError, DeviceError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE}: {error}") from error
    if named != most:
        warnings.warn(
            f"the weights in {folder} are stored in {_name(most)}, but its configuration says "
            f"{_name(named)}: they are converted. Pass dtype={_name(most)!r} to keep them as they are.",
            AudioFlamingoWarning,
            stacklevel=3,
        )
    return named


def _most_common(dtypes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype with the most elements."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, num_elements in dtypes:
        counts[dtype] += num_elements
    return counts.most_common(1)[0][0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_recorded(
    folder: Path, config: AudioFlamingo3Config, asked: str | QuantizationConfig | None
) -> None:
    """Refuses a scheme that is not the one of a quantized folder."""
    recorded = read_quantization(config)
    assert recorded is not None
    if asked not in (None, recorded.scheme, recorded, replace(recorded, is_calibrated=False)):
        raise CheckpointError(
            f"{folder} is quantized as {recorded}, but quantization={str(asked)!r} was asked for: leave that out, or "
            "load the original checkpoint."
        )


def _place(device_map: DeviceMap | None, model: nn.Module, dtype: torch.dtype) -> Placement:
    """`plan_placement`; a quantized model lies on the CPU or on one GPU."""
    if not packed_layers(model):
        return plan_placement(device_map, model, dtype)
    if device_map == "auto":
        device_map = "cuda:0" if torch.cuda.is_available() and has_triton() else "cpu"
    placement = plan_placement(device_map, model, dtype)
    devices = set(placement.devices.values())
    if len(devices) > 1 or any(device.type not in QUANTIZED_DEVICES for device in devices):
        raise DeviceError(
            f"a quantized model runs on the CPU or on one NVIDIA GPU, not on {', '.join(sorted(map(str, devices)))}; "
            "leave device_map out, or load the original checkpoint there."
        )
    if any(device.type == "cuda" for device in devices):
        check_triton()
    return placement


def _check_complete(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Refuses to save anything but exactly the tensors that the configuration describes."""
    foreign = sorted(set(state) - set(expected))
    if any("lora_" in name or ".base_layer." in name or ".modules_to_save." in name for name in foreign):
        raise CheckpointError(
            f"the model holds adapter layers ({shorten(foreign)}), which a checkpoint cannot: save the "
            "adapter with the PEFT model's own save_pretrained, or merge it first: model = "
            "peft_model.merge_and_unload()."
        )
    odd = [*foreign, *sorted(set(expected) - set(state))]
    odd += [
        f"{name} {list(state[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if odd:
        raise CheckpointError(
            f"the model's tensors do not fit its config, so the folder could not be loaded: {shorten(odd)}."
        )


def config_to_save(config: AudioFlamingo3Config, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json`: what was read, with today's dtype and the class that loads it."""
    values = {**config.to_dict(), "architectures": [config.architecture], "dtype": _name(dtype)}
    for part in (values["audio_config"], values["text_config"]):
        part.update({key: _name(dtype) for key in ("dtype", "torch_dtype") if key in part})
    return values
