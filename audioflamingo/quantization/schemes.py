"""What is quantized and how: the schemes, the format of each layer, and their record in `config.json`.

| scheme | layers of the language model | encoder, projector, output layer, embeddings |
|---|---|---|
| `int8` | int8 per channel | int8 per channel |
| `int4` | 4 bit in groups | int8 per channel |
| `fp8` | float8 (E4M3) per channel | float8; output layer and embeddings int8 |

`fp8` is for GPUs that multiply in it: prompts and clips then take half the arithmetic of bfloat16. Its rounding (3 bits
of a mantissa) is coarser than that of `int8`, which is as large.

The scheme `int4` keeps 8 bits where 4 would gain little: the encoder and the projector run once a clip and are bound by
arithmetic, which is int8 either way; of the embeddings only the rows of a prompt are read; errors of the output layer
reach the logits undamped. On a small trained model the answers' distribution moved by 0.004 nats (mean divergence from
float32) this way, by 0.008 with the output layer in 4 bits too (`output_bits`), and by 0.045 with the encoder in 4
bits as well.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from audioflamingo.errors import ArgumentError, CheckpointError
from audioflamingo.kernels import INT4_GROUPS

SCHEMES = ("int8", "int4", "fp8")
# The record says who wrote it under a key of its own. With "quant_method", the key of others, transformers would skip
# a record that it does not know and load the folder with random weights; without it, it refuses.
LIBRARY = "audioflamingo"
FORMAT_VERSION = 1
DEFAULT_GROUP_SIZE = 64
CONFIG_KEY = "quantization_config"
_INT4_PREFIX = "model.language_model.layers."
_OUTPUT_LAYER = "lm_head"
OUTPUT_BITS = (8, 4)
OUTPUT_GROUP = 32  # of an output layer with 4 bits, whose errors reach the logits: the finest


@dataclass(frozen=True)
class LayerFormat:
    """How the weights of one layer are stored.

    Attributes:
        bits: 8 or 4.
        group: inputs that share a group scale; None for 8 bits.
        is_smoothed: inputs are multiplied by factors first (see `smoothing`).
        is_float: the 8 bits are a float8 (E4M3).
    """

    bits: int
    group: int | None = None
    is_smoothed: bool = False
    is_float: bool = False

    @property
    def name(self) -> str:
        """What the weights are: `"int8"`, `"int4"` or `"float8"`."""
        return f"{'float' if self.is_float else 'int'}{self.bits}"

    @property
    def tensor_name(self) -> str:
        """Name of the packed integers, which no other format shares: their shape alone would not tell groups apart."""
        return f"packed_{self.name}" if self.group is None else f"packed_{self.name}_g{self.group}"


@dataclass(frozen=True)
class QuantizationConfig:
    """A scheme with its settings.

    Attributes:
        scheme: `"int8"`, `"int4"` or `"fp8"`.
        group_size: largest number of inputs that share a group scale (`"int4"` only). Layers whose inputs it does not
            divide take the largest smaller size that does.
        is_calibrated: rounding followed measured prompts, and layers hold factors of their inputs.
        output_bits: of the output layer, 8 or 4 (in groups of 32). It is read whole for every token.
    """

    scheme: str
    group_size: int | None = None
    is_calibrated: bool = False
    output_bits: int = OUTPUT_BITS[0]

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ArgumentError(f"quantization {self.scheme!r} does not exist; choose from {SCHEMES}.")
        if self.scheme != "int4" and self.group_size is not None:
            raise ArgumentError(
                f"group_size belongs to 'int4'; {self.scheme!r} has one scale a channel: leave it out."
            )
        if self.scheme == "int4" and self.group_size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
        if not isinstance(self.is_calibrated, bool):
            raise ArgumentError(f"is_calibrated must be true or false, got {self.is_calibrated!r}.")
        if self.scheme == "fp8" and self.is_calibrated:
            raise ArgumentError("'fp8' rounds each weight by itself: leave the prompts of calibration out.")
        if isinstance(self.output_bits, bool) or self.output_bits not in OUTPUT_BITS:
            raise ArgumentError(f"output_bits must be one of {OUTPUT_BITS}, got {self.output_bits!r}.")
        if self.scheme == "int4" and self.group_size not in INT4_GROUPS:
            raise ArgumentError(f"group_size must be one of {INT4_GROUPS}, got {self.group_size!r}.")

    def __str__(self) -> str:
        group = "" if self.group_size is None else f", group {self.group_size}"
        output = "" if self.output_bits == OUTPUT_BITS[0] else f", output layer in {self.output_bits} bits"
        return self.scheme + group + (", calibrated" if self.is_calibrated else "") + output

    def layer_format(self, name: str, module: nn.Module) -> LayerFormat | None:
        """Format of a module of the model by its name; None if it stays as it is.

        Raises:
            ArgumentError: 4 bits for a layer whose inputs no group size divides.
        """
        is_embedding = isinstance(module, nn.Embedding) and name.endswith("embed_tokens")
        if not (is_embedding or isinstance(module, nn.Linear)):
            return None
        if is_embedding:
            return LayerFormat(8)
        assert isinstance(module, nn.Linear)
        if name == _OUTPUT_LAYER and self.output_bits == 4:
            return LayerFormat(4, self._group(name, module.in_features, OUTPUT_GROUP), self.is_calibrated)
        if self.scheme == "fp8" and name != _OUTPUT_LAYER:
            return LayerFormat(8, is_float=True)
        is_4_bit = self.scheme == "int4" and name.startswith(_INT4_PREFIX)
        group = self._group(name, module.in_features, self.group_size) if is_4_bit else None
        return LayerFormat(4 if is_4_bit else 8, group, self.is_calibrated)

    def _group(self, name: str, in_features: int, largest: int | None) -> int:
        assert largest is not None
        fitting = [size for size in INT4_GROUPS if size <= largest and in_features % size == 0]
        if not fitting:
            raise ArgumentError(
                f"{name} has {in_features} inputs, which no group of {min(INT4_GROUPS)} to {largest} "
                "divides; use 'int8'."
            )
        return max(fitting)

    def check_divides(self, model: nn.Module) -> None:
        """Refuses layers whose inputs `group_size` itself does not divide.

        Raises:
            ArgumentError: names the first such layer.
        """
        for name, module in model.named_modules():
            format_ = self.layer_format(name, module)
            if name != _OUTPUT_LAYER and format_ is not None and format_.group not in (None, self.group_size):
                assert isinstance(module, nn.Linear)
                raise ArgumentError(
                    f"group_size {self.group_size} does not divide the {module.in_features} inputs of {name}; "
                    f"{format_.group} would, or leave group_size out."
                )

    def to_dict(self) -> dict[str, Any]:
        """The record for `config.json`."""
        return {"library": LIBRARY, "version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the record of `config.json`.

        Raises:
            CheckpointError: made by something else, by a newer version, or damaged.
        """
        if values.get("library") != LIBRARY:
            raise CheckpointError(
                f"the checkpoint is quantized by {values.get('quant_method')!r}, which this package does not read; "
                f"load the original checkpoint with quantization={SCHEMES[0]!r} or {SCHEMES[1]!r}."
            )
        version = values.get("version")
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(f"{CONFIG_KEY} has the version {version!r}; the checkpoint is damaged.")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint is quantized in format {version}, this version reads up to {FORMAT_VERSION}: "
                "update audioflamingo (pip install -U audioflamingo), or quantize the original checkpoint again."
            )
        try:
            return cls(
                str(values.get("scheme")),
                values.get("group_size"),
                values.get("is_calibrated", False),
                values.get("output_bits", OUTPUT_BITS[0]),
            )
        except ArgumentError as error:
            raise CheckpointError(f"{CONFIG_KEY}: {error}") from error


def as_config(
    quantization: str | QuantizationConfig,
    group_size: int | None = None,
    is_calibrated: bool | None = None,
    output_bits: int | None = None,
) -> QuantizationConfig:
    """A scheme by its name, or as it is, with what else is asked for (None: nothing).

    `is_calibrated` says whether there are prompts.

    Raises:
        ArgumentError: no such scheme, or a calibrated one without prompts.
    """
    if isinstance(quantization, QuantizationConfig):
        if quantization.is_calibrated and is_calibrated is False:
            raise ArgumentError(
                f"{str(quantization)!r} needs prompts: quantize(model, ..., calibration=prompts)."
            )
        is_calibrated = is_calibrated or quantization.is_calibrated
    elif isinstance(quantization, str):
        quantization = QuantizationConfig(quantization)
    else:
        raise ArgumentError(f"quantization must be one of {SCHEMES}, got {quantization!r}.")
    asked: dict[str, Any] = {
        "group_size": group_size,
        "is_calibrated": is_calibrated,
        "output_bits": output_bits,
    }
    return dataclasses.replace(
        quantization, **{name: value for name, value in asked.items() if value is not None}
    )


def read_quantization(config: Any) -> QuantizationConfig | None:
    """The record in a model's configuration; None if it is not quantized.

    Raises:
        CheckpointError: as `QuantizationConfig.from_dict`.
    """
    values = config.extra.get(CONFIG_KEY)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{CONFIG_KEY} must be an object, got {values!r}; the checkpoint is damaged.")
    return QuantizationConfig.from_dict(values)


def with_quantization(config: Any, quantization: QuantizationConfig | None) -> Any:
    """A copy of a model's configuration with another record, or without one."""
    changed = copy.deepcopy(config)
    changed.extra.pop(CONFIG_KEY, None)
    if quantization is not None:
        changed.extra[CONFIG_KEY] = quantization.to_dict()
    return changed
