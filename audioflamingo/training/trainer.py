"""The training loop: stages, steps, validation, checkpoints. `train` is the entry.

Everything that the next step depends on is in a checkpoint or follows from the config's seed, so a run that was
killed goes on exactly as if it had not been (a cosine over minutes follows the clock and is the one exception).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.errors import ConfigError, require
from audioflamingo.files import to_json, write_text
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration, AutoModelForConditionalGeneration
from audioflamingo.processor import AutoProcessor
from audioflamingo.quantization import read_quantization
from audioflamingo.training.log import MetricsLog
from audioflamingo.training.module import TrainingModule
from audioflamingo.training.parts import add_lora
from audioflamingo.training.precision import resolve_precision
from audioflamingo.training.resume import LoadedCheckpoint, list_checkpoints, read_state
from audioflamingo.training.stage import StageRun
from audioflamingo.training.training_config import TrainingConfig
from audioflamingo.training.training_run import CHECKPOINTS_FOLDER, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG_FILE = "config.json"
# Keys that may differ between a run and its continuation: they do not change what is learned.
_FREE_KEYS = (
    "output_dir",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "tensorboard",
    "device",
)
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        step: optimizer steps in all.
        best, best_step: best value of `best_metric`, and its step; None without validation data.
        best_dir, last_dir: folders of the saved models.
    """

    step: int
    best: float | None
    best_step: int | None
    best_dir: Path
    last_dir: Path


def train(config: TrainingConfig, *, fresh: bool = False, show_progress: bool = True) -> TrainingResult:
    """Trains, or goes on with an interrupted run of the same config.

    Args:
        config: see `TrainingConfig`.
        fresh: remove the checkpoints of an earlier run in `output_dir` first.
        show_progress: draw a progress bar.

    Raises:
        ConfigError: the config contradicts itself, the model, the data or the run in `output_dir`.
        DataError: data that cannot be used.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is from before.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
        MissingDependencyError: an optional package is not installed.
    """
    accelerate = require("accelerate", "train")
    uses_cpu = config.device == "cpu" or not torch.cuda.is_available()
    accelerator = accelerate.Accelerator(
        mixed_precision=_PRECISIONS[resolve_precision(config.precision, uses_cpu)],
        cpu=uses_cpu,
        kwargs_handlers=[
            accelerate.DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        ],
    )
    try:
        return Trainer(config, accelerator, fresh, show_progress).run()
    finally:
        accelerator.end_training()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


class Trainer:
    """One run; see `train`."""

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, fresh: bool, show_progress: bool
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.output_dir = Path(config.output_dir).expanduser()
        self._check_processes()
        fingerprint = _fingerprint(config)
        self.checkpoint = self._open_output(fingerprint, fresh)
        torch.manual_seed(config.seed)
        model = _load_model(config)
        processor = AutoProcessor.from_pretrained(config.model)
        adapter = add_lora(model, config.lora, config.model) if config.uses_lora else None
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        module = TrainingModule(model, any(stage.ctc_weight for stage in config.stages))
        module.to(accelerator.device)
        data = config.data
        bounds = (data.on_bad_row, data.min_duration_s, data.max_duration_s, config.seed)
        self.shared = Run(
            config=config,
            fingerprint=fingerprint,
            accelerator=accelerator,
            show_progress=show_progress and accelerator.is_main_process,
            processor=processor,
            module=module,
            adapter=adapter,
            datasets=[read_dataset(item, *bounds) for item in data.train],
            validation_rows=[row for item in data.validation for row in read_dataset(item, *bounds).rows],
        )

    def _check_processes(self) -> None:
        num = self.accelerator.num_processes
        for stage in self.config.stages:
            per_step = (stage.batch or self.config.batch).batches_per_step
            if per_step % num:
                raise ConfigError(f"batches_per_step {per_step} is not divisible by the {num} processes.")
        if self.accelerator.distributed_type != "FSDP":
            return
        if len(self.config.stages) > 1:
            raise ConfigError(
                "FSDP runs one stage a config: give each stage its own run, each from the last's model."
            )
        if self.config.quantization is not None or self.config.optimizer != "adamw":
            raise ConfigError(
                "FSDP shards float weights and plain AdamW: leave quantization and optimizer out."
            )

    def _open_output(self, fingerprint: str, fresh: bool) -> Path | None:
        """Makes the output folder; returns the checkpoint to go on from."""
        folder = self.output_dir / CHECKPOINTS_FOLDER
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                _remove_run(self.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoints = list_checkpoints(folder)
        if checkpoints and read_state(checkpoints[-1])[1] != fingerprint:
            difference = _difference(self.output_dir, self.config)
            raise ConfigError(
                f"{str(self.output_dir)!r} holds a run of another config ({difference}); choose another output_dir, "
                "or start again with --fresh."
            )
        if self.accelerator.is_main_process:
            write_text(self.output_dir / CONFIG_FILE, to_json(self.config.to_dict()))
        return checkpoints[-1] if checkpoints else None

    def run(self) -> TrainingResult:
        """Runs the stages that are left."""
        run, loaded = self.shared, None
        if self.checkpoint is not None:
            run.progress, _ = read_state(self.checkpoint)
            loaded = LoadedCheckpoint(self.checkpoint)
            loaded.restore_weights(run.module, run.stored_names(run.progress.stage))
        if self.accelerator.is_main_process:
            run.log = MetricsLog(self.output_dir, run.progress.step, self.config.tensorboard)
        with run.stop_signal:
            for index in range(run.progress.stage, len(self.config.stages)):
                StageRun(run, index, loaded if loaded is not None and loaded.has_optimizer else None).run()
                loaded = None
        if run.log is not None:
            run.log.plot()
            run.log.close()
        best_dir, last_dir = self.output_dir / "best", self.output_dir / "last"
        return TrainingResult(
            run.progress.step, run.progress.best, run.progress.best_step, best_dir, last_dir
        )


def _load_model(config: TrainingConfig) -> AudioFlamingo3ForConditionalGeneration:
    model = AutoModelForConditionalGeneration.from_pretrained(
        config.model, dtype=config.weights_dtype, quantization=config.quantization
    )
    quantization = read_quantization(model.config)
    if quantization is not None and config.trained_parts != {"lora"}:
        raise ConfigError(
            f"model: {config.model} is quantized ({quantization}); train lora alone on it, or the original."
        )
    num_layers = model.config.text_config.num_hidden_layers
    if (deepest := max(stage.ctc_layer for stage in config.stages)) > num_layers:
        raise ConfigError(f"ctc_layer {deepest} is more than the language model's {num_layers} layers.")
    return model


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _FREE_KEYS}
    return {**kept, "data": {key: value for key, value in config["data"].items() if key != "num_workers"}}


def _fingerprint(config: TrainingConfig) -> str:
    return hashlib.sha256(json.dumps(_comparable(config.to_dict()), sort_keys=True).encode()).hexdigest()


def _difference(output_dir: Path, config: TrainingConfig) -> str:
    """Keys in which the stored config differs."""
    try:
        stored = _comparable(json.loads((output_dir / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return "its config is gone"
    ours = json.loads(json.dumps(_comparable(config.to_dict())))
    differing = [key for key in ours if stored.get(key) != ours[key]]
    return f"different: {', '.join(differing)}" if differing else "of another version"


def _remove_run(output_dir: Path) -> None:
    for name in (CHECKPOINTS_FOLDER, "tensorboard"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "log.jsonl").unlink(missing_ok=True)
    (output_dir / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
