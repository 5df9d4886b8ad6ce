"""How much each input of each layer matters, measured on a few prompts.

The mean square of an input is what an error in its weights is multiplied by, as long as inputs are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from audioflamingo.errors import ArgumentError

MAX_NEW_TOKENS = 64  # the model's own answers count too, as far as this
FLOOR = 0.01  # of a layer's mean: inputs that the prompts did not use still matter


class _MeanSquares:
    """Sums the squares of the inputs of one layer."""

    def __init__(self, num_inputs: int) -> None:
        self.total = torch.zeros(num_inputs, dtype=torch.float64)
        self.num_rows = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self.total += rows.square().sum(dim=0, dtype=torch.float64)
        self.num_rows += len(rows)

    def importance(self) -> Tensor:
        mean = (self.total / self.num_rows).float()
        return mean + FLOOR * mean.mean()


def measure_importance(model: Any, prompts: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Answers prompts and measures what the linear layers get.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration` that is not quantized.
        prompts: batches as the processor returns them.

    Returns:
        For each linear layer that ran, the mean square of its inputs, float32 `(K,)`.

    Raises:
        ArgumentError: there are no prompts, or they drive the model to NaN.
    """
    sums = {
        name: _MeanSquares(module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in sums.items()]
    try:
        for prompt in prompts:
            model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
    finally:
        for handle in handles:
            handle.remove()
    measured = {name: found.importance() for name, found in sums.items() if found.num_rows}
    if not measured:
        raise ArgumentError("calibration holds no prompts; pass batches of the processor.")
    bad = [name for name, importance in measured.items() if not importance.isfinite().all()]
    if bad:
        raise ArgumentError(f"the calibration prompts give NaN or infinity in {bad[0]}.")
    return measured
