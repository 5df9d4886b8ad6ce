"""Layers with packed integer weights: what a linear layer and the token embeddings become.

The packed bytes are what the kernels read (`kernels.weight_layout`), on a CPU and on a GPU, so a saved layer is mapped
from its file and used as it is. The weights are not trained, but gradients pass through them, to adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audioflamingo.errors import ArgumentError, DeviceError
from audioflamingo.kernels import gather_int8, gpu, linear_int4, linear_int8, unpack_int4, unpack_int8
from audioflamingo.kernels.weight_layout import BLOCK_ROWS
from audioflamingo.quantization.calibration import LayerInputs
from audioflamingo.quantization.packing import SCALES, SMOOTHING, pack_layer, packed_shape
from audioflamingo.quantization.rounding import FLOAT8
from audioflamingo.quantization.schemes import LayerFormat

QUANTIZED_DEVICES = ("cpu", "cuda", "meta")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_BACKWARD_WEIGHTS = 1 << 24  # weights that are dequantized at one time: 64 MiB in float32


class PackedWeight(nn.Module):
    """A matrix `(N, K)` as packed integers with a float scale a row.

    Args:
        shape: (N, K).
        format_: how the integers are stored.

    Attributes:
        scales: float32 `(N,)`.
    """

    scales: Tensor

    def __init__(self, shape: tuple[int, int], format_: LayerFormat) -> None:
        super().__init__()
        self.shape = shape
        self.format = format_
        self._packed_name = format_.tensor_name
        self.register_buffer(self._packed_name, torch.empty(packed_shape(shape, format_), dtype=torch.uint8))
        self.register_buffer(SCALES, torch.empty(shape[0], dtype=torch.float32))

    @property
    def packed(self) -> Tensor:
        """The integers as the kernels read them, uint8; the buffer is named after the format."""
        packed = self._buffers[self._packed_name]
        assert packed is not None
        return packed

    @property
    def qweight(self) -> Tensor:
        """The integers, under the name by which peft finds where a quantized layer is."""
        return self.packed

    def fill(self, weight: Tensor, name: str, inputs: LayerInputs | None = None) -> None:
        """Takes over a matrix; see `pack_layer`."""
        for leaf, tensor in pack_layer(weight, self.format, name, inputs).items():
            self._buffers[leaf] = tensor.to(weight.dtype) if leaf == SMOOTHING else tensor

    def dequantize(self, start: int = 0, end: int | None = None) -> Tensor:
        """The matrix that the integers and their scales stand for, float32 `(N, K)`, or rows of it.

        Args:
            start: the first row, a multiple of `BLOCK_ROWS`.
            end: where the rows end; None for the last one.
        """
        assert start % BLOCK_ROWS == 0
        end = self.shape[0] if end is None else min(end, self.shape[0])
        packed = self.packed[start // BLOCK_ROWS : -(-end // BLOCK_ROWS)]
        shape = (end - start, self.shape[1])
        if self.format.group is None:
            values = unpack_int8(packed, shape)
            values = values.view(FLOAT8) if self.format.is_float else values
        else:
            values = unpack_int4(packed, shape, self.format.group)
        return values.float() * self.scales[start:end, None]

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        num_rows, num_columns = self.shape
        group = "" if self.format.group is None else f", group={self.format.group}"
        kind = ", float8" if self.format.is_float else ""
        return f"{num_columns}, {num_rows}, bits={self.format.bits}{group}{kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to(dtype)` changes what the layer computes in, never its scales; other devices are refused."""
        device = fn(torch.empty(0, device=self.packed.device)).device
        if device.type not in QUANTIZED_DEVICES:
            raise DeviceError(
                f"a quantized model runs on a CPU or an NVIDIA GPU, not on {device}; load the original checkpoint with "
                "dtype='bfloat16' there."
            )
        scales = self._buffers.pop(SCALES)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        assert scales is not None
        moved = fn(scales)
        self._buffers[SCALES] = moved if moved.dtype == scales.dtype else scales.to(moved.device)
        return self


class QuantizedLinear(PackedWeight):
    """A linear layer whose weights are integers.

    On a CPU activations are rounded to int8, token by token, and a token's result does not depend on the tokens beside
    it. On a GPU they stay as they are. Beside float8 weights they stay so on a CPU, too (which is slow there: a
    reference), and many tokens are rounded to float8 on a GPU that multiplies in it.

    Attributes:
        smoothing: powers of two `(K,)` in the model's dtype, which activations are multiplied by; None for 1.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it is a parameter of the model's dtype.
        format_: how the weights are stored.
    """

    smoothing: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, format_: LayerFormat) -> None:
        super().__init__((out_features, in_features), format_)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_buffer(SMOOTHING, torch.ones(in_features) if format_.is_smoothed else None)

    def dequantize(self, start: int = 0, end: int | None = None) -> Tensor:
        """Those rows in float32 `(N, K)`, as they act on activations that are not smoothed."""
        values = super().dequantize(start, end)
        return values if self.smoothing is None else values * self.smoothing.float()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., K)` to `(..., N)` in the dtype of `x`, or in that of autocast as `nn.Linear` does.

        The gradient of `x` passes through the dequantized weights, as if activations were not rounded.

        Raises:
            ArgumentError: the layer itself is to be trained.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.is_grad_enabled():
            return self._product(x)
        if self.bias is not None and self.bias.requires_grad:
            raise ArgumentError(
                "the weights of a quantized model cannot be trained: leave requires_grad_(False) on them and train "
                "an adapter (LoRA), or load the original checkpoint without quantization."
            )
        return _ThroughWeights.apply(x, self) if x.requires_grad else self._product(x)  # type: ignore[no-untyped-call]

    def _product(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.smoothing is not None:
            x = x * self.smoothing
        if x.is_cuda:
            x = x if dtype in gpu.FLOAT_DTYPES else x.float()
            weights = self.packed, self.scales, self.bias
            out = gpu.linear_packed(x, *weights, self.shape, self.format.group, self.format.is_float)
            return out.to(dtype)
        if self.format.is_float:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.dequantize(), bias).to(dtype)
        if dtype not in _KERNEL_DTYPES:
            x = x.float()
        bias = None if self.bias is None else self.bias.float()
        if self.format.group is None:
            out = linear_int8(x, self.packed, self.scales, bias, self.shape)
        else:
            out = linear_int4(x, self.packed, self.scales, bias, self.shape, self.format.group)
        return out.to(dtype)


class _ThroughWeights(torch.autograd.Function):
    """A quantized layer whose input needs a gradient: nothing but the packed weights is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer: QuantizedLinear = ctx.layer
        (grad,) = grads
        num_rows, num_columns = layer.shape
        step = max(1, _BACKWARD_WEIGHTS // num_columns // BLOCK_ROWS) * BLOCK_ROWS
        flat = grad.reshape(-1, num_rows).float()
        total = flat.new_zeros(len(flat), num_columns)
        for start in range(0, num_rows, step):
            total.addmm_(flat[:, start : start + step], layer.dequantize(start, start + step))
        return total.view(*grad.shape[:-1], num_columns).to(grad.dtype), None


class QuantizedEmbedding(PackedWeight):
    """Token embeddings in int8, one scale a token.

    Args:
        num_embeddings: tokens.
        embedding_dim: width.
        format_: how the table is stored; 8 bits.

    Attributes:
        dtype: of the result; `to(dtype)` changes it.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, format_: LayerFormat) -> None:
        assert format_.group is None
        super().__init__((num_embeddings, embedding_dim), format_)
        self.dtype = torch.get_default_dtype()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Looks up ids `(...)`: `(..., D)`."""
        gather = gpu.gather_packed if self.packed.is_cuda else gather_int8
        return gather(input_ids, self.packed, self.scales, self.shape, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return self


def empty_layer(module: nn.Module, format_: LayerFormat) -> PackedWeight:
    """The quantized layer in place of `module`, not filled, on the device of its weights."""
    weight: Any = module.weight
    with torch.device(weight.device):
        if isinstance(module, nn.Embedding):
            embedding = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, format_)
            embedding.dtype = weight.dtype
            return embedding
        assert isinstance(module, nn.Linear)
        linear = QuantizedLinear(module.in_features, module.out_features, module.bias is not None, format_)
        linear.to(weight.dtype)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear
