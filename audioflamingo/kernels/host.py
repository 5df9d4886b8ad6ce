"""The one place where values leave the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def to_host(tensor: Tensor) -> Any:
    """Copies a tensor to Python numbers (nested lists), waiting for the device.

    Every value that steers Python code passes through here, so the places where a GPU is waited for can be counted,
    and a run can be replayed on tensors that hold no data.
    """
    return tensor.tolist()
