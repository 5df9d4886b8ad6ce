"""Random weights in the range that the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor


def random_int8(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """int8 (rows, columns) over the whole range -127..127."""
    return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)


def random_int4(rows: int, columns: int, group: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Values -8..7 and group scales whose products use the whole range -127..127."""
    values = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    largest = values.view(rows, -1, group).int().abs().amax(dim=2).clamp(min=1)
    scales = (torch.rand(rows, columns // group, generator=generator) * (127 // largest + 1)).int()
    return values, torch.minimum(scales, 127 // largest).to(torch.uint8)
