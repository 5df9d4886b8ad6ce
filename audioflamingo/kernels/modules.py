"""The linear layers and convolutions: torch's own, quicker in bfloat16 and float16 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from audioflamingo.errors import DeviceError
from audioflamingo.kernels import gpu, linear_halves
from audioflamingo.kernels.halves import HALVES, is_slow


def check_autocast(x: Tensor) -> None:
    """Refuses the one mixture that torch's operations on a CPU do not take.

    Args:
        x: what layers in its dtype are about to take.

    Raises:
        DeviceError: it is float16 under an autocast to bfloat16, or the other way round, on a CPU.
    """
    if not (x.is_cpu and x.dtype in HALVES and torch.is_autocast_enabled("cpu")):
        return
    cast = torch.get_autocast_dtype("cpu")
    if cast in HALVES and cast != x.dtype:
        raise DeviceError(
            f"a model in {str(x.dtype)[6:]} cannot run under torch.autocast('cpu', {cast}); load it with "
            f"dtype=torch.float32, or with dtype={cast} and no autocast."
        )


class Linear(nn.Linear):
    """`nn.Linear`, fast in bfloat16 and float16 on a CPU.

    Up to 16 rows, as in decoding, read the weights once and at memory speed, and more rows take the way through
    float32 where that is faster. On a GPU the single row of a captured step is read so, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        if input.is_cuda and gpu.takes_row(input, self.weight, self.bias):
            return gpu.linear_row(input, self.weight, self.bias)
        return linear_halves(input, self.weight, self.bias)


class Conv1d(nn.Conv1d):
    """`nn.Conv1d`, through float32 where halves are slow."""

    def forward(self, input: Tensor) -> Tensor:
        """`(B, in_channels, T)` -> `(B, out_channels, T')`."""
        if not is_slow(input, input.shape[-1]):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)
