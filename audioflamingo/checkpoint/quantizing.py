"""The tensors of a quantized model, made from a checkpoint one at a time.

Each stored tensor is mapped alone and let go as soon as it is rounded, so that beside what the caller keeps there is
never more than one of them in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from audioflamingo.checkpoint.weights import StoredTensor, read_tensor
from audioflamingo.errors import ArgumentError, CheckpointError
from audioflamingo.quantization.calibration import LayerInputs
from audioflamingo.quantization.packing import SCALES, SMOOTHING, pack_layer
from audioflamingo.quantization.quantize_model import packed_layers


class QuantizingReader:
    """Reads the tensors of a quantized model from a checkpoint that is not.

    Args:
        model: the quantized model, its tensors on the meta device.
        stored: what the checkpoint holds, by the names of the model that is not quantized.
        dtype: of what is not quantized.
        measured: see `quantization.calibration`.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        measured: Mapping[str, LayerInputs] | None = None,
    ) -> None:
        self._layers = packed_layers(model)
        self._stored = stored
        self._dtype = dtype
        self._measured = measured or {}
        self._small: dict[str, Tensor] = {}  # what else belongs to layers whose integers were read

    def read(self, name: str) -> Tensor:
        """A tensor of the quantized model. The integers of a layer must be read before its other tensors.

        Raises:
            CheckpointError: the file cannot be read, or holds NaN.
        """
        layer_name, _, leaf = name.rpartition(".")
        layer = self._layers.get(layer_name)
        if layer is None or leaf not in (layer.format.tensor_name, SCALES, SMOOTHING):
            return self._read_stored(name).to(self._dtype, copy=True)
        if leaf != layer.format.tensor_name:
            tensor = self._small.pop(name)
            return tensor.to(self._dtype) if leaf == SMOOTHING else tensor
        weight = self._read_stored(f"{layer_name}.weight")
        try:
            tensors = pack_layer(weight, layer.format, layer_name, self._measured.get(layer_name))
        except ArgumentError as error:
            raise CheckpointError(f"{self._stored[f'{layer_name}.weight'].path}: {error}") from error
        packed = tensors.pop(leaf)
        self._small |= {f"{layer_name}.{other}": tensor for other, tensor in tensors.items()}
        return packed

    def _read_stored(self, name: str) -> Tensor:
        """Maps one tensor. The file is closed when the tensor goes, and with it all that was read."""
        stored = self._stored[name]
        try:
            with safe_open(stored.path, framework="pt", device="cpu") as file:
                return read_tensor(file, stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {stored.path}: {error}; get the file again.") from error
