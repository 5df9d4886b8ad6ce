"""In what a run computes: what `precision: auto` means on a machine."""

from __future__ import annotations

import torch

from audioflamingo.errors import ConfigError
from audioflamingo.kernels.halves import slowness

BFLOAT16_PAYS = 0.8  # share of float32's time below which a CPU trains in bfloat16


def resolve_precision(precision: str, uses_cpu: bool) -> str:
    """What `auto` means on this machine.

    Raises:
        ConfigError: float16 on a CPU.
    """
    if precision == "float16" and uses_cpu:
        raise ConfigError("precision: float16 needs a GPU; set auto, bfloat16 or float32.")
    if precision != "auto":
        return precision
    if not uses_cpu:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if slowness() < BFLOAT16_PAYS else "float32"
