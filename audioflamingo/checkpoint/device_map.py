"""Where the weights go and in which dtype: turns `device_map=` and `dtype=` into checked devices and dtypes.

One device needs nothing but torch. Several need `accelerate`, which moves the activations between them; it is
imported only then. Offloading to disk is left out on purpose: it would be slower than any use of this model
allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from audioflamingo.errors import ArgumentError, DeviceError, require

DeviceMap = str | int | torch.device | Mapping[str, "str | int | torch.device"]

# Blocks that stay on one device. The encoder reads some of its weights directly and is small: it stays whole.
PRELOADED_MODULES = ["AudioFlamingo3Encoder"]  # all weights are brought in before it runs
NO_SPLIT_MODULES = ["AudioFlamingo3Encoder", "AudioFlamingo3EncoderLayer", "Qwen2DecoderLayer"]
FLOAT_DTYPE_NAMES = ("bfloat16", "float16", "float32", "float64")
_EXTRA = "multi-gpu"  # what installs accelerate


@dataclass(frozen=True)
class Placement:
    """Device of each part of the model, by the longest matching module name; `""` is for all the rest."""

    devices: dict[str, torch.device]

    @property
    def is_split(self) -> bool:
        """Whether parts of the model lie on different devices."""
        return len(set(self.devices.values())) > 1

    def device_of(self, name: str) -> torch.device | None:
        """Returns the device of a parameter; None if no entry covers it."""
        prefix = name
        while prefix and prefix not in self.devices:
            prefix = prefix.rpartition(".")[0]
        return self.devices.get(prefix)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Reads a dtype or its name (`"bfloat16"`, `"torch.bfloat16"`).

    Raises:
        ArgumentError: there is no such dtype.
        DeviceError: the model cannot run in it (integers, 8-bit floats).
    """
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None) if isinstance(dtype, str | torch.dtype) else None
    if not isinstance(found, torch.dtype):
        raise ArgumentError(
            f"dtype must be 'auto', a torch.dtype or one of {FLOAT_DTYPE_NAMES}, got {dtype!r}."
        )
    if str(found).removeprefix("torch.") not in FLOAT_DTYPE_NAMES:
        raise DeviceError(f"the model cannot run in dtype {name!r}; choose from {FLOAT_DTYPE_NAMES}.")
    return found


def check_devices(device_map: DeviceMap | None) -> None:
    """Checks what can be checked of `device_map` without the model, before anything is downloaded.

    Raises:
        DeviceError, ArgumentError: as `parse_device`.
    """
    if device_map is not None and device_map != "auto":
        for device in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
            parse_device(device)


def plan_placement(device_map: DeviceMap | None, model: nn.Module, dtype: torch.dtype) -> Placement:
    """Decides the device of every parameter, before any weight is read.

    Args:
        device_map: None or `"cpu"`; a device (`"cuda"`, `"cuda:1"`, 1, `torch.device`); `"auto"`: all CUDA
            devices, else MPS, else the CPU; or a dict from module names to devices.
        model: the model, its parameters on the meta device.
        dtype: dtype that the weights will have.

    Raises:
        DeviceError: a device that is not there or cannot run `dtype`.
        ArgumentError: a dict that names no module of the model or leaves some out.
        MissingDependencyError: several devices without `accelerate`.
    """
    if isinstance(device_map, Mapping):
        devices = _read_dict(device_map, model)
    elif device_map == "auto":
        devices = _choose_devices(model, dtype)
    else:
        devices = {"": parse_device("cpu" if device_map is None else device_map)}
    for device in set(devices.values()):
        _check_dtype(device, dtype)
    placement = Placement(devices)
    if placement.is_split:
        require("accelerate", _EXTRA)
    return placement


def parse_device(device: str | int | torch.device) -> torch.device:
    """Reads a device and checks that this machine has it.

    Raises:
        ArgumentError: not a device.
        DeviceError: no such device here, or one that cannot run the model (`"disk"`, `"meta"`).
    """
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise ArgumentError(f"a device must be a name, a CUDA index or a torch.device, got {device!r}.")
    if device == "disk":
        raise DeviceError(
            "device 'disk' (offloading) is not supported; use a GPU with more memory, several, or 'cpu'."
        )
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"{device!r} is not a device; use 'auto', 'cpu', 'cuda', 'cuda:0', 'mps' ..."
        ) from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise DeviceError(
                f"device {device!r} is not here: torch {torch.__version__} sees {count} CUDA device(s). "
                f"Use one of {', '.join(_present_devices())}, or device_map='auto'."
            )
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            f"device 'mps' is not here; use one of {', '.join(_present_devices())}, or device_map='auto'."
        )
    is_known = found.type in ("cpu", "mps") or (found.type == "xpu" and torch.xpu.is_available())
    if not is_known:
        raise DeviceError(
            f"device {device!r} cannot run the model here; use one of {', '.join(_present_devices())}."
        )
    return found


def _present_devices() -> list[str]:
    cuda = [f"'cuda:{i}'" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return cuda + (["'mps'"] if torch.backends.mps.is_available() else []) + ["'cpu'"]


def _check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a dtype that a device lacks."""
    if device.type == "mps" and dtype == torch.float64:
        raise DeviceError("MPS devices cannot run float64; pass dtype='float32'.")
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise DeviceError(
                f"{device} ({torch.cuda.get_device_name(device)}) has compute capability "
                f"{capability[0]}.{capability[1]}; bfloat16 starts at 8.0. Pass dtype='float16'."
            )


def _read_dict(
    device_map: Mapping[str, str | int | torch.device], model: nn.Module
) -> dict[str, torch.device]:
    """Checks a dict of module names: each must exist, and together they must cover every parameter."""
    modules = dict(model.named_modules())
    unknown = [name for name in device_map if name not in modules]
    if unknown:
        top = [name for name in modules if name and name.count(".") <= 1]
        raise ArgumentError(
            f"device_map names {unknown[0]!r}, which is no module of the model; there are: {', '.join(top)}."
        )
    devices = {name: parse_device(device) for name, device in device_map.items()}
    placement = Placement(devices)
    left_out = [name for name, _ in model.named_parameters() if placement.device_of(name) is None]
    if left_out:
        raise ArgumentError(
            f"device_map says nothing about {left_out[0]!r} and {len(left_out) - 1} more parameters; "
            "add their modules, or an entry '' for all that is left."
        )
    return _coarsest(model, placement)


def _coarsest(model: nn.Module, placement: Placement, prefix: str = "") -> dict[str, torch.device]:
    """The same placement as few, disjoint modules: the largest whose parameters share a device."""
    owned = [f"{prefix}.{name}".lstrip(".") for name, _ in model.named_parameters()]
    found = {placement.device_of(name) for name in owned}
    if len(found) == 1:
        device = found.pop()
        assert device is not None
        return {prefix: device}
    if type(model).__name__ in NO_SPLIT_MODULES:
        raise ArgumentError(f"device_map splits {prefix!r}; a {type(model).__name__} must lie on one device.")
    children = (
        _coarsest(child, placement, f"{prefix}.{name}".lstrip("."))
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
    )
    return {name: device for part in children for name, device in part.items()}


def _choose_devices(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.device]:
    """`"auto"`: every CUDA device, else MPS, else the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        return split_over_devices(model, dtype)
    if count == 1:
        return {"": torch.device("cuda", 0)}
    return {"": torch.device("mps" if torch.backends.mps.is_available() else "cpu")}


def split_over_devices(
    model: nn.Module, dtype: torch.dtype, max_memory: dict[int | str, int] | None = None
) -> dict[str, torch.device]:
    """Spreads the model over devices in equal parts, keeping layers whole.

    Args:
        model: the model, on the meta device.
        dtype: dtype that the weights will have.
        max_memory: bytes to use of each device; None takes what is free on each CUDA device.

    Raises:
        DeviceError: the devices together are too small.
        MissingDependencyError: `accelerate` is not installed.
    """
    accelerate = require("accelerate", _EXTRA)
    if max_memory is None:
        balanced = accelerate.utils.get_balanced_memory(
            model, dtype=dtype, no_split_module_classes=NO_SPLIT_MODULES
        )
        max_memory = {device: size for device, size in balanced.items() if device != "cpu"}
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    devices = accelerate.infer_auto_device_map(
        model, max_memory=max_memory, no_split_module_classes=NO_SPLIT_MODULES, dtype=dtype
    )
    if "disk" in devices.values():
        raise DeviceError(
            f"the weights take {needed / 1e9:.1f} GB in {dtype}, more than the devices have free "
            f"({', '.join(f'{device}: {size / 1e9:.1f} GB' for device, size in max_memory.items())}); "
            "pass a smaller dtype, or device_map='cpu'."
        )
    return {
        name: torch.device("cuda", d) if isinstance(d, int) else torch.device(d)
        for name, d in devices.items()
    }


def connect_devices(model: nn.Module, placement: Placement, inputs: nn.Module) -> None:
    """Adds the hooks that move activations between the devices of a split model. Changes `model`.

    Parts on the CPU beside a GPU stay in CPU memory and visit the GPU while they run, which is slow.

    Args:
        model: the model, loaded.
        placement: where its parts are.
        inputs: the module that inputs reach first; it cannot be one of those parts on the CPU.
    """
    main = next(inputs.parameters()).device
    if main.type == "cpu":
        raise DeviceError(
            "device_map puts the token embeddings on 'cpu' and other parts on a GPU; put them on a GPU too."
        )
    devices = {name: str(device) for name, device in placement.devices.items()}
    require("accelerate", _EXTRA).dispatch_model(
        model,
        device_map=devices,
        main_device=str(main),
        skip_keys=["past_key_values", "cache"],
        preload_module_classes=PRELOADED_MODULES,
    )
