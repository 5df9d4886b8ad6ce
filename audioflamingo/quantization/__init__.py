"""int8 and int4: the same model with smaller weights, for CPUs and GPUs.

config (schemes, their record), calibration (what layers get to see) -> smoothing, rounding, packing (weights to
integers) -> layers (packed integers that run) -> convert (a model in memory), streaming (a checkpoint, tensor by
tensor) and folders (from one folder to another).
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
