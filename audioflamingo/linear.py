"""The linear layers of the language model: `nn.Linear`, quicker for a few rows in bfloat16 on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from audioflamingo.kernels import linear_bf16


class Linear(nn.Linear):
    """`nn.Linear`. Up to 16 bfloat16 rows on a CPU, as in decoding, read the weights once and at memory speed."""

    def forward(self, input: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        return linear_bf16(input, self.weight, self.bias)
