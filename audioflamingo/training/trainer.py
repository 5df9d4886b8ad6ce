"""The training loop: stages, steps, validation, checkpoints. `train` is the entry.

Everything that the next step depends on is in a checkpoint or follows from the config's seed, so a run that was
killed goes on exactly as if it had not been (a cosine over minutes follows the clock and is the one exception).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from audioflamingo.audio.stored import path_of
from audioflamingo.engine.memory import map_large_blocks
from audioflamingo.errors import ConfigError, TrainingError, require
from audioflamingo.files import FileWatch
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration, AutoModelForConditionalGeneration
from audioflamingo.processor import AutoProcessor
from audioflamingo.quantization import read_quantization
from audioflamingo.training.log import MetricsLog
from audioflamingo.training.module import TrainingModule
from audioflamingo.training.parts import add_lora
from audioflamingo.training.precision import resolve_precision
from audioflamingo.training.reading_data import read_data
from audioflamingo.training.resume import LoadedCheckpoint, read_state
from audioflamingo.training.run_folder import RunFolder
from audioflamingo.training.stage import StageRun
from audioflamingo.training.training_config import TrainingConfig
from audioflamingo.training.training_run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

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
        TrainingError: another trainer of this process has set up accelerate for another precision or device.
    """
    accelerate = require("accelerate", "train")
    accelerator = _accelerator(config, accelerate)
    folder = RunFolder(config, accelerator)
    try:
        return Trainer(config, accelerator, folder, fresh, show_progress).run()
    finally:
        folder.close()
        accelerator.end_training()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


def _accelerator(config: TrainingConfig, accelerate: Any) -> Accelerator:
    """Where and in which precision the run computes; the package keeps one such state for a whole process."""
    uses_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if uses_cpu:
        map_large_blocks()
    precision = resolve_precision(config.precision, uses_cpu)
    kept = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        return accelerate.Accelerator(
            mixed_precision=_PRECISIONS[precision], cpu=uses_cpu, kwargs_handlers=[kept]
        )
    except ValueError as error:
        if not accelerate.state.is_initialized():
            raise
        state = accelerate.state.AcceleratorState()
        raise TrainingError(
            f"accelerate is set up in this process for {state.mixed_precision!r} on {state.device}, by another trainer "
            f"(transformers' leaves its state behind); this run needs {precision}"
            f"{' on the CPU' if uses_cpu else ''}: train in a process of its own"
        ) from error


class Trainer:
    """One run; see `train`."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        fresh: bool,
        show_progress: bool,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self._check_processes()
        self.checkpoint = self.folder.open(fresh)
        torch.manual_seed(config.seed)
        model = _load_model(config)
        processor = AutoProcessor.from_pretrained(config.model)
        adapter = add_lora(model, config.lora, config.model) if config.uses_lora else None
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        module = TrainingModule(model, any(stage.ctc_weight for stage in config.stages))
        module.to(accelerator.device)
        datasets, validation = read_data(config, processor, model.config)
        fingerprints = self.folder.check_data(datasets, validation, is_begun=self.checkpoint is not None)
        self.folder.report_skipped([*datasets, *validation], show_progress)
        self.shared = Run(
            config=config,
            fingerprint=self.folder.fingerprint,
            accelerator=accelerator,
            show_progress=show_progress and accelerator.is_main_process,
            processor=processor,
            module=module,
            adapter=adapter,
            datasets=datasets,
            validation_rows=[row for dataset in validation for row in dataset.rows],
            watch=FileWatch(
                (path_of(c) for data in [*datasets, *validation] for row in data.rows for c in row.audio),
                fingerprints,
            ),
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

    def run(self) -> TrainingResult:
        """Runs the stages that are left."""
        run, loaded = self.shared, None
        if self.checkpoint is not None:
            run.progress, _ = read_state(self.checkpoint)
            loaded = LoadedCheckpoint(self.checkpoint)
            loaded.restore_weights(run.module, run.stored_names(run.progress.stage))
        if self.accelerator.is_main_process:
            run.log = MetricsLog(self.folder.path, run.progress.step, self.config.tensorboard)
        with run.stop_signal:
            for index in range(run.progress.stage, len(self.config.stages)):
                StageRun(run, index, loaded if loaded is not None and loaded.has_optimizer else None).run()
                loaded = None
        if run.log is not None:
            run.log.plot()
            run.log.close()
        best_dir, last_dir = self.folder.path / "best", self.folder.path / "last"
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
