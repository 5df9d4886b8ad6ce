"""What a stage trains: parameters by part, LoRA on the language model only, and the optimizer's groups."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from audioflamingo.errors import ConfigError, TrainingError, require
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.quantization.layers import QuantizedLinear
from audioflamingo.quantization.quantize_model import packed_layers
from audioflamingo.training.training_config import LoraSettings, StageConfig, TrainingConfig

if TYPE_CHECKING:
    from peft import PeftModel

UNADAPTED_KEY = "unadapted_layers"
CTC_PART = "ctc"  # the trainer's own head, not a part of the model
_PREFIXES = {
    "model.audio_tower.": "encoder",
    "model.multi_modal_projector.": "projector",
    "model.language_model.": "language_model",
    "lm_head.": "language_model",
}
# The stored position table is not trained, in Whisper as in AF3.
_NEVER_TRAINED = ("model.audio_tower.embed_positions.",)
_LAYER = re.compile(r"model\.audio_tower\.layers\.(\d+)\.")


def part_of(name: str) -> str:
    """Part of a parameter, by its name in the model: `encoder`, `projector`, `language_model` or `lora`."""
    part = next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), None)
    if part is None:
        raise TrainingError(f"the parameter {name} belongs to no part of the model.")
    if ".lora_" in name:
        if part != "language_model":
            raise TrainingError(
                f"an adapter was put into the {part}: {name}. Only the language model takes one."
            )
        return "lora"
    return part


@dataclass(frozen=True)
class Adapter:
    """LoRA layers in a model.

    Attributes:
        peft_model: peft's model around it, to save the adapter with.
        settings: of the layers.
    """

    peft_model: PeftModel
    settings: LoraSettings


def add_lora(model: AudioFlamingo3WithHead, settings: LoraSettings, base: str | None = None) -> Adapter:
    """Puts LoRA layers into the language model, in place: over float layers and over quantized ones.

    The encoder has layers of the same names, so targets are matched by full path. Where the settings name no layers,
    these are all but those that the model's `config.json` lists under `UNADAPTED_KEY`.

    Args:
        model: AF3.
        settings: of the layers.
        base: what the adapter's configuration calls the model.

    Raises:
        ConfigError: a target or a layer that the language model does not have.
    """
    peft = require("peft", "train")
    linear = (nn.Linear, QuantizedLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    present = {name.rpartition(".")[2] for name in names if name.startswith("model.language_model.layers.")}
    if missing := [target for target in settings.target_modules if target not in present]:
        raise ConfigError(
            f"lora.target_modules: the language model has no {missing[0]!r}, only {sorted(present)}."
        )
    num_layers = model.config.text_config.num_hidden_layers
    layers = settings.layers_to_transform
    if layers is None:
        left_out = model.config.extra.get(UNADAPTED_KEY) or []
        if not isinstance(left_out, list):
            raise ConfigError(f"config.json: {UNADAPTED_KEY} must be a list of layers, got {left_out!r}.")
        layers = [number for number in range(num_layers) if number not in left_out]
    if not layers or not set(layers) <= set(range(num_layers)):
        raise ConfigError(
            f"lora.layers_to_transform: {list(layers)} must name some of the language model's layers, 0 to "
            f"{num_layers - 1}."
        )
    numbers, targets = "|".join(map(str, layers)), "|".join(map(re.escape, settings.target_modules))
    pattern = rf"model\.language_model\.layers\.({numbers})\.\w+\.({targets})"
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=pattern,
    )
    lora._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Unsupported layer type"
        )  # it does not know ours, and asks them all the same
        adapted = peft.get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = base
    return Adapter(adapted, settings)


def select_parameters(model: nn.Module, stage: StageConfig) -> dict[str, list[str]]:
    """Sets `requires_grad` for a stage.

    Args:
        model: AF3, possibly with LoRA layers.
        stage: its `learning_rates` name what is trained.

    Returns:
        Names of the trained parameters by part.

    Raises:
        ConfigError: a part has nothing to train, or quantized weights.
    """
    for name in packed_layers(model):
        if (part := part_of(f"{name}.")) in stage.learning_rates:
            raise ConfigError(
                f"learning_rates.{part}: the model is quantized, and such weights are not trained; train lora, or the "
                "original model."
            )
    first_layer = 0
    if stage.encoder_last_layers is not None:
        numbers = [int(match[1]) for name, _ in model.named_parameters() if (match := _LAYER.match(name))]
        first_layer = max(numbers) + 1 - stage.encoder_last_layers
        if first_layer < 0:
            raise ConfigError(f"encoder_last_layers is more than the encoder's {max(numbers) + 1} layers.")
    trained: dict[str, list[str]] = {part: [] for part in stage.learning_rates}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        is_trained = part in trained and not name.startswith(_NEVER_TRAINED)
        if part == "encoder" and stage.encoder_last_layers is not None:
            match = _LAYER.match(name)
            is_last_norm = name.startswith("model.audio_tower.layer_norm.")
            is_trained = is_trained and (is_last_norm or (match is not None and int(match[1]) >= first_layer))
        parameter.requires_grad_(is_trained)
        if is_trained:
            trained[part].append(name)
    for part, names in trained.items():
        if not names:
            raise ConfigError(f"learning_rates.{part}: the model has no such parameters.")
    return trained


def frozen_layers(stage: StageConfig, num_layers: int) -> int:
    """Layers of the encoder, from the first on, that a stage leaves as they are; `num_layers` if it trains none."""
    if "encoder" not in stage.learning_rates:
        return num_layers
    return num_layers - (stage.encoder_last_layers or num_layers)


def cached_layers(stages: Sequence[StageConfig], num_layers: int) -> int | None:
    """Layers whose output every stage with cached features can start from; None: the encoder's audio tokens."""
    frozen = [count for stage in stages if (count := frozen_layers(stage, num_layers)) > 0]
    return None if min(frozen, default=num_layers) == num_layers else min(frozen)


def build_optimizer(
    module: nn.Module, stage: StageConfig, kind: str = TrainingConfig.optimizer
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of the trainer's module; groups by part, biases and norms without decay.

    Each group holds its `part`. The CTC head learns at the projector's rate, or the encoder's if that is frozen.

    Args:
        module: the trainer's.
        stage: its rates, decay and betas.
        kind: `optimizer` of the config.

    Raises:
        MissingDependencyError: an 8-bit one without bitsandbytes.
        ConfigError: a paged one on a CPU.
    """
    optimizer = _optimizer_class(kind, next(module.parameters()).device)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = CTC_PART if name.startswith("ctc_head.") else part_of(name.removeprefix("model."))
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    if not groups:
        raise TrainingError("nothing is trained.")
    built: torch.optim.Optimizer = optimizer(
        [
            {
                "params": parameters,
                "lr": base_rate(part, stage),
                "weight_decay": stage.weight_decay if is_decayed else 0.0,
                "part": part,
            }
            for (part, is_decayed), parameters in groups.items()
        ],
        betas=stage.betas,
    )
    return built


def _optimizer_class(kind: str, device: torch.device) -> Any:
    if kind == "adamw":
        return torch.optim.AdamW
    if kind.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"optimizer: {kind} needs a CUDA GPU, this run is on {device}; set adamw_8bit or adamw."
        )
    optimizers = require("bitsandbytes.optim", "train-8bit", "bitsandbytes")
    return optimizers.PagedAdamW8bit if kind.startswith("paged") else optimizers.AdamW8bit


def base_rate(part: str, stage: StageConfig) -> float:
    """Learning rate of a part before warm-up and cosine."""
    if part == CTC_PART:
        rates = stage.learning_rates
        return rates.get("projector", rates.get("encoder", max(rates.values())))
    return stage.learning_rates[part]
