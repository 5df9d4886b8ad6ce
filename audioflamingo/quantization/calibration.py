"""What each linear layer gets to see, measured on a few prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from audioflamingo.errors import ArgumentError

MAX_NEW_TOKENS = 64  # the model's own answers count too, as far as this
NUM_TOKENS = 32  # at least, and less than twice as many are kept of each layer, evenly spread
FLOOR = 0.01  # of a layer's mean square: inputs that the prompts did not use still matter


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one layer.

    Attributes:
        mean_squares: float32 `(K,)`: what an error in the weights of an input is multiplied by, as long as inputs are
            uncorrelated.
        largest: float32 `(K,)`, the largest magnitude of each.
        tokens: a sample, bfloat16 `(T, K)`.
    """

    mean_squares: Tensor
    largest: Tensor
    tokens: Tensor


class _Recorder:
    """Watches the inputs of one layer."""

    def __init__(self, num_inputs: int) -> None:
        self._squares = torch.zeros(num_inputs, dtype=torch.float64)
        self._largest = torch.zeros(num_inputs)
        self._tokens = torch.empty(0, num_inputs, dtype=torch.bfloat16)
        self._stride = 1  # of the tokens that are kept
        self.num_tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self._squares += rows.square().sum(dim=0, dtype=torch.float64)
        self._largest = torch.maximum(self._largest, rows.abs().amax(dim=0))
        first = -self.num_tokens % self._stride
        self._tokens = torch.cat([self._tokens, rows[first :: self._stride].bfloat16()])
        self.num_tokens += len(rows)
        while len(self._tokens) >= 2 * NUM_TOKENS:
            self._tokens, self._stride = self._tokens[::2].clone(), 2 * self._stride

    def inputs(self) -> LayerInputs:
        mean = (self._squares / self.num_tokens).float()
        return LayerInputs(mean + FLOOR * mean.mean(), self._largest, self._tokens)


@torch.no_grad()
def measure_inputs(model: Any, prompts: Iterable[Mapping[str, Any]]) -> dict[str, LayerInputs]:
    """Answers prompts and measures what the linear layers get.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration` that is not quantized.
        prompts: batches as the processor returns them.

    Returns:
        The inputs of each linear layer that ran, by its name.

    Raises:
        ArgumentError: there are no prompts, or they drive the model to NaN.
    """
    recorders = {
        name: _Recorder(module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    handles = [model.get_submodule(name).register_forward_pre_hook(r) for name, r in recorders.items()]
    try:
        for prompt in prompts:
            model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
    finally:
        for handle in handles:
            handle.remove()
    measured = {name: recorder.inputs() for name, recorder in recorders.items() if recorder.num_tokens}
    if not measured:
        raise ArgumentError("calibration holds no prompts; pass batches of the processor.")
    bad = [name for name, inputs in measured.items() if not inputs.mean_squares.isfinite().all()]
    if bad:
        raise ArgumentError(f"the calibration prompts give NaN or infinity in {bad[0]}.")
    return measured
