"""The one place where values leave the device, and the one where they go there without being waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Any:
    """Copies a tensor to Python numbers (nested lists), waiting for the device.

    Every value that steers Python code passes through here, so the places where a GPU is waited for can be counted,
    and a run can be replayed on tensors that hold no data.
    """
    return tensor.tolist()


def to_device(
    values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Copies numbers, or a tensor of the host, to a device; a GPU is not waited for.

    The copy to a GPU starts from pinned memory, which torch keeps until it is over, and runs in the order of the
    stream; from ordinary memory the host would wait for everything that the stream still has to do.

    Args:
        values: numbers, or a tensor.
        device: where to.
        dtype: of the result; by default that of the values.
    """
    if isinstance(values, Tensor):
        if values.device == device or not (values.is_cpu and _pins(device)):
            return values.to(device, dtype)
        return values.to(dtype=dtype).pin_memory().to(device, non_blocking=True)
    if not _pins(device):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)


def _pins(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()
