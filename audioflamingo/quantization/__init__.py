"""int8, int4 and float8: the same model with smaller weights, for CPUs and GPUs.

schemes (what is quantized and how, and its record), calibration (what layers get to see) -> smoothing, rounding,
packing -> layers (packed weights that run) -> quantize_model (a model in memory). A checkpoint is quantized tensor by
tensor in `checkpoint.quantizing`, from one folder to another in `quantize_folder`.
"""

from audioflamingo.quantization.layers import QuantizedEmbedding, QuantizedLinear
from audioflamingo.quantization.quantize_model import num_parameters, quantize
from audioflamingo.quantization.schemes import (
    DEFAULT_GROUP_SIZE,
    SCHEMES,
    QuantizationConfig,
    as_config,
    read_quantization,
)

__all__ = [
    "DEFAULT_GROUP_SIZE",
    "SCHEMES",
    "QuantizationConfig",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "as_config",
    "num_parameters",
    "quantize",
    "read_quantization",
]
