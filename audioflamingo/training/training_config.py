"""The configuration of a training run: dataclasses, checked once, read from YAML.

Paths are relative to the working folder; `${NAME}` stands for an environment variable. `recipes/stages.yaml` and
`recipes/lora.yaml` are commented examples.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ConfigError, check, reason_of, require
from audioflamingo.training.settings import build, override

PARTS = ("encoder", "projector", "language_model", "lora")
CTC_ALPHABET = "abcdefghijklmnopqrstuvwxyz' "


@dataclass(frozen=True)
class DataConfig:
    """The data.

    Attributes:
        train: data sets that are mixed.
        validation: data sets for loss and word error rate.
        on_bad_row: `skip` reports bad rows (file and line) and goes on, `error` stops.
        min_duration_s, max_duration_s: rows with less or more audio in all are left out, and counted.
        num_workers: processes that prepare batches; 0 prepares them in the main one.
    """

    train: list[DatasetConfig]
    validation: list[DatasetConfig] = field(default_factory=list)
    on_bad_row: Literal["skip", "error"] = "error"
    min_duration_s: float = 0.0
    max_duration_s: float = 600.0
    num_workers: int = 0

    def __post_init__(self) -> None:
        check(bool(self.train), "train needs at least one data set.")
        check(self.num_workers >= 0, "num_workers must be at least 0.")


@dataclass(frozen=True)
class BatchConfig:
    """How rows become batches; a batch is closed when the next row would pass a limit.

    Attributes:
        max_tokens: audio tokens (25 a second) and text tokens of a batch.
        max_rows: rows of a batch.
        max_audio_s: seconds of audio of a batch.
        batches_per_step: batches of one optimizer step, over all processes and accumulation together: the same
            config gives the same steps on any number of processes that divides it.
    """

    max_tokens: int = 6000
    max_rows: int = 64
    max_audio_s: float | None = None
    batches_per_step: int = 1

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_rows", "batches_per_step"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        check(self.max_audio_s is None or self.max_audio_s > 0, "max_audio_s must be above 0.")


@dataclass(frozen=True)
class SpecAugmentConfig:
    """SpecAugment (arXiv 1904.08779) on the log-mel features, or, when these are cached, on the encoder's output.

    Attributes:
        time_masks, max_time_s: number of masked stretches, and the longest.
        mel_masks, max_mels: number of masked bands, and the widest (log-mel only).
        max_time_share: no more than this share of a clip is masked.
    """

    time_masks: int = 0
    max_time_s: float = 0.5
    mel_masks: int = 0
    max_mels: int = 15
    max_time_share: float = 0.2


@dataclass(frozen=True)
class AugmentationConfig:
    """Changes of the waveform; each is drawn with its probability, in this order.

    Attributes:
        speed_probability, speed: resampling by a factor from this range (pitch changes too).
        reverb_probability, reverb_s: a synthetic room; range of the decay by 60 dB in seconds.
        noise_probability, noise_folder, noise_snr_db: a random stretch of a random file of the folder, mixed in.
        band_probability, band_hz: low-pass by resampling; range of the upper limit in Hz (telephones: 3400).
        gain_probability, gain_db: range of the change of level.
        spec: SpecAugment.
    """

    speed_probability: float = 0.0
    speed: tuple[float, float] = (0.9, 1.1)
    reverb_probability: float = 0.0
    reverb_s: tuple[float, float] = (0.1, 0.6)
    noise_probability: float = 0.0
    noise_folder: str | None = None
    noise_snr_db: tuple[float, float] = (5.0, 25.0)
    band_probability: float = 0.0
    band_hz: tuple[float, float] = (3000.0, 5000.0)
    gain_probability: float = 0.0
    gain_db: tuple[float, float] = (-12.0, 6.0)
    spec: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)

    def __post_init__(self) -> None:
        for name in ("speed", "reverb", "noise", "band", "gain"):
            value = getattr(self, f"{name}_probability")
            check(0 <= value <= 1, f"{name}_probability must lie in [0, 1], got {value}.")
        for name in ("speed", "reverb_s", "noise_snr_db", "band_hz", "gain_db"):
            low, high = getattr(self, name)
            check(low <= high, f"{name} must be [lowest, highest], got {[low, high]}.")
        check(self.speed[0] > 0 and self.reverb_s[0] > 0 and self.band_hz[0] > 0, "ranges must be above 0.")
        check(
            self.noise_probability == 0 or self.noise_folder is not None,
            "noise_probability needs noise_folder.",
        )

    @property
    def changes_waveform(self) -> bool:
        """Whether any change of the waveform can be drawn."""
        return any(
            getattr(self, f"{name}_probability") for name in ("speed", "reverb", "noise", "band", "gain")
        )


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Encoder outputs on disk, for stages with a frozen encoder.

    Augmentation of the waveform happens before caching: each clip is encoded `augmented_copies` times with changes
    drawn once for all, and once as it is unless `keep_clean` is false. Each visit of a row takes one of these.

    Attributes:
        folder: where shards go; several runs may share it (keys: content, encoder, augmentation).
        augmented_copies: augmented versions of each clip.
        keep_clean: also keep the clip as it is.
        shard_clips: clips of a shard; a stopped build loses at most one shard's work for each process.
        precision: the encoder's; the rows are stored in float16 anyway.
    """

    folder: str
    augmented_copies: int = 0
    keep_clean: bool = True
    shard_clips: int = 1000
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check(self.augmented_copies >= 0 and self.shard_clips >= 1, "counts must not be negative.")
        check(self.keep_clean or self.augmented_copies > 0, "keep_clean: false needs augmented_copies.")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (arXiv 2106.09685) on the language model's linear layers.

    Attributes:
        rank, alpha, dropout: as in peft's `LoraConfig`.
        target_modules: names of the linear layers; only those of the language model are adapted.
        layers_to_transform: numbers of the language model's layers that are adapted, from 0; None: all, but those
            that a model's `config.json` lists under `unadapted_layers` (in the built-in model the first).
        merge: also fold the adapter into the weights of the saved model.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    layers_to_transform: list[int] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"rank must be at least 1, got {self.rank}.")
        check(0 <= self.dropout < 1, f"dropout must be from 0 to below 1, got {self.dropout}.")
        check(bool(self.target_modules), "target_modules must name at least one linear layer.")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation during training.

    Attributes:
        every_steps: how often; None only at the end of each stage.
        max_batches: batches of the validation loss; None takes all.
        generate_rows: rows that are answered for word error rate and accuracy; 0 is off.
        max_new_tokens: of those answers.
    """

    every_steps: int | None = None
    max_batches: int | None = 50
    generate_rows: int = 64
    max_new_tokens: int = 128


@dataclass(frozen=True)
class StageConfig:
    """One stage: what is trained, for how long, and how.

    Attributes:
        learning_rates: rate of each trained part (`encoder`, `projector`, `language_model` or `lora`); other parts
            are frozen.
        max_steps, max_epochs, max_minutes: the stage ends at the first that is reached. The cosine follows steps or
            epochs if one is given (then a run can be repeated exactly), else the clock.
        name: in logs and bars.
        encoder_last_layers: train only the last n layers of the encoder and its final norm.
        schedule: `cosine` falls to `final_rate` times the rate, `constant` does not.
        warmup_steps: steps of linear rise.
        answer_weight: weight of the answer's cross-entropy; 0 skips the language model.
        ctc_weight: weight of a character CTC loss on transcription rows; 0 is off.
        ctc_layer: the CTC loss reads the audio tokens behind this layer of the language model; 0: the projector's
            output. A later layer teaches the language model at the audio tokens too, where answers alone teach little.
        max_duration_s: leave out rows with more audio in this stage.
        batch: batches of this stage in place of the run's.
    """

    learning_rates: dict[str, float]
    max_steps: int | None = None
    max_epochs: float | None = None
    max_minutes: float | None = None
    name: str = ""
    encoder_last_layers: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    final_rate: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float | None = 1.0
    answer_weight: float = 1.0
    ctc_weight: float = 0.0
    ctc_layer: int = 0
    max_duration_s: float | None = None
    batch: BatchConfig | None = None

    def __post_init__(self) -> None:
        check(bool(self.learning_rates), f"learning_rates must name at least one of {', '.join(PARTS)}.")
        for part, rate in self.learning_rates.items():
            check(part in PARTS, f"learning_rates has no part {part!r}; the parts are {', '.join(PARTS)}.")
            check(rate > 0, f"learning_rates.{part} must be above 0; leave a frozen part out.")
        limits = (self.max_steps, self.max_epochs, self.max_minutes)
        check(any(limit is not None for limit in limits), "give max_steps, max_epochs or max_minutes.")
        check(
            all(limit is None or limit > 0 for limit in limits),
            "max_steps, _epochs and _minutes are above 0.",
        )
        check(self.answer_weight >= 0 and self.ctc_weight >= 0, "loss weights must not be negative.")
        check(self.answer_weight + self.ctc_weight > 0, "answer_weight and ctc_weight are both 0.")
        check(self.ctc_layer >= 0, f"ctc_layer must not be negative, got {self.ctc_layer}.")
        check(
            self.ctc_layer == 0 or self.answer_weight > 0,
            "ctc_layer needs answer_weight above 0: without answers the language model does not run.",
        )
        trains_language_model = {"language_model", "lora"} & set(self.learning_rates)
        check(
            self.answer_weight > 0 or not trains_language_model,
            "answer_weight 0 cannot train the language model.",
        )
        check(
            self.encoder_last_layers is None or "encoder" in self.learning_rates,
            "encoder_last_layers needs a rate.",
        )
        check(
            self.encoder_last_layers is None or self.encoder_last_layers >= 1,
            "encoder_last_layers must be at least 1; leave the encoder out of learning_rates to freeze it.",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run.

    Attributes:
        model: folder or hub id to start from, with its processor.
        output_dir: checkpoints, logs, `best/` and `last/`. An interrupted run there is resumed.
        data, stages: see their classes. Stages run one after the other.
        precision: of the forward pass; weights are kept in `weights_dtype`. `auto` is bfloat16 where the hardware
            computes in it (a GPU that does, a CPU whose products in it are measured to be faster), else float32.
            `float16` needs a GPU.
        weights_dtype: dtype of the weights while training.
        quantization: `int8` or `int4` quantizes the frozen base while loading, for LoRA in little memory (QLoRA, arXiv
            2305.14314). A folder that is quantized already needs no asking.
        optimizer: `adamw`; `adamw_8bit` keeps its state in 8 bits (arXiv 2110.02861), `paged_adamw_8bit` moves it to
            the CPU's memory when the GPU's is full. These two need bitsandbytes.
        save_dtype: dtype of the saved models; None keeps `weights_dtype`.
        checkpoint_every_steps, keep_checkpoints: exact checkpoints to resume from.
        log_every_steps: steps between lines of `log.jsonl`; the last of a stage has its line always.
        best_metric: what `best/` is chosen by: `loss` or `wer` of the validation, or `accuracy`.
        device: `auto` takes a GPU if there is one.
    """

    model: str
    output_dir: str
    data: DataConfig
    stages: list[StageConfig]
    batch: BatchConfig = field(default_factory=BatchConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    feature_cache: FeatureCacheConfig | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["int8", "int4"] | None = None
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gradient_checkpointing: bool = False
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 2
    log_every_steps: int = 10
    best_metric: Literal["loss", "wer", "accuracy"] = "loss"
    tensorboard: bool = True
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check(bool(self.stages), "stages must hold at least one stage.")
        for name in ("checkpoint_every_steps", "keep_checkpoints", "log_every_steps"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1.")
        parts = self.trained_parts
        check(
            not {"language_model", "lora"} <= parts,
            "train either language_model or lora in one run, not both.",
        )
        check(self.seed >= 0, "seed must not be negative.")
        check(
            self.quantization is None or parts == {"lora"},
            f"quantization: {self.quantization} freezes the model's weights, so stages can train lora only; leave "
            f"{', '.join(sorted(parts - {'lora'}))} out of learning_rates, or leave quantization out.",
        )

    @property
    def trained_parts(self) -> set[str]:
        """Parts of the model that any stage trains."""
        return {part for stage in self.stages for part in stage.learning_rates}

    @property
    def uses_lora(self) -> bool:
        """Whether any stage trains an adapter."""
        return "lora" in self.trained_parts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML file would hold them."""
        return dataclasses.asdict(self)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingConfig:
    """Reads a YAML config.

    Args:
        path: the file.
        overrides: `key=value` with dotted keys, for example `stages.0.max_minutes=20`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong. The message names it.
        MissingDependencyError: pyyaml is not installed.
    """
    yaml = require("yaml", "train", "pyyaml")
    try:
        values = yaml.safe_load(expand_variables(Path(path).read_text(encoding="utf-8"), str(path)))
        if not isinstance(values, dict):
            raise ConfigError("it must hold a mapping of keys to values.")
        values.pop("shared", None)  # a place for YAML anchors
        for assignment in overrides:
            override(values, assignment, yaml.safe_load)
        return build(TrainingConfig, values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {reason_of(error)}.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def expand_variables(text: str, where: str) -> str:
    """Replaces `${NAME}` and `${NAME:-default}` by environment variables."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[3])
        if found is None:
            raise ConfigError(f"the environment variable {match[1]} is not set; {where} needs it.")
        return found

    return re.sub(r"\$\{(\w+)(:-([^}]*))?\}", value, text)
