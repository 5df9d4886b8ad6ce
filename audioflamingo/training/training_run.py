"""What all stages of a run share: the model, the data, where the run is, and how it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from audioflamingo.datasets.conversations import DataRow, Dataset
from audioflamingo.files import FileWatch, write_text
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.display import StopSignal
from audioflamingo.training.exporting import ADAPTER_FOLDER, VLLM_FOLDER, export
from audioflamingo.training.log import MetricsLog
from audioflamingo.training.model_card import CARD_FILE, model_card
from audioflamingo.training.module import TrainingModule
from audioflamingo.training.parts import Adapter, cached_layers, select_parameters
from audioflamingo.training.resume import Progress, save_checkpoint
from audioflamingo.training.training_config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS_FOLDER = "checkpoints"


@dataclass
class Run:
    """A run between its stages.

    Attributes:
        config: of the run.
        fingerprint: of the config, for checkpoints.
        accelerator: of accelerate.
        show_progress: draw progress bars in this process.
        processor: of the model.
        module: the model with what helps training, on its device, not wrapped.
        adapter: LoRA layers, if there are any.
        datasets, validation_rows: the data.
        progress: where the run is.
        log: of the main process, while it runs.
        watch: knows the audio files as they were when the run began.
        stop_signal: set when the run is to stop at the next step.
    """

    config: TrainingConfig
    fingerprint: str
    accelerator: Accelerator
    show_progress: bool
    processor: AudioFlamingo3Processor
    module: TrainingModule
    adapter: Adapter | None
    datasets: Sequence[Dataset]
    validation_rows: Sequence[DataRow]
    progress: Progress = field(default_factory=Progress)
    log: MetricsLog | None = None
    watch: FileWatch = field(default_factory=lambda: FileWatch(()))
    stop_signal: StopSignal = field(default_factory=StopSignal)

    @property
    def model(self) -> AudioFlamingo3ForConditionalGeneration:
        """The model in training."""
        return self.module.model

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir).expanduser()

    @property
    def cached_layers(self) -> int | None:
        """What the feature cache holds: see `parts.cached_layers`."""
        return cached_layers(self.config.stages, self.model.config.audio_config.num_hidden_layers)

    def stored_names(self, stage: int) -> set[str]:
        """Parameters that the stages up to this one train, and the CTC head's: what checkpoints hold."""
        names = {name for name, _ in self.module.named_parameters() if name.startswith("ctc_head.")}
        for item in self.config.stages[: stage + 1]:
            for part in select_parameters(self.model, item).values():
                names.update(f"model.{name}" for name in part)
        return names

    def save_checkpoint(
        self, module: nn.Module, optimizer: torch.optim.Optimizer | None, stored_names: set[str]
    ) -> None:
        """Writes a checkpoint to resume from; without an optimizer, one between two stages."""
        save_checkpoint(
            self.output_dir / CHECKPOINTS_FOLDER,
            self.accelerator,
            module,
            optimizer,
            stored_names,
            self.progress,
            self.config.keep_checkpoints,
            self.fingerprint,
        )

    def save_model(self, name: str, module: nn.Module) -> None:
        """Saves `best` or `last`."""
        progress, dtype = self.progress, self.config.save_dtype
        folder = self.output_dir / name
        export(
            folder,
            module,
            self.model,
            self.processor,
            is_main_process=self.accelerator.is_main_process,
            dtype=None if dtype is None else getattr(torch, dtype),
            notes={"step": progress.step, "best": progress.best, "best_step": progress.best_step},
            adapter=self.adapter,
            trained_parts=self.config.trained_parts,
        )
        if self.accelerator.is_main_process:
            self._write_card(folder)
        self.accelerator.wait_for_everyone()

    def _write_card(self, folder: Path) -> None:
        """Puts a draft of a model card with the curves so far into what was saved, the adapter's folders too."""
        entries = [] if self.log is None else self.log.entries()
        is_merged = self.adapter is None or self.adapter.settings.merge
        adapters = [(folder / name, True) for name in (ADAPTER_FOLDER, VLLM_FOLDER)]
        for target, is_adapter in ((folder, not is_merged), *adapters):
            if target.is_dir():
                step = self.progress.step
                card = model_card(self.config, self.datasets, self.validation_rows, entries, step, is_adapter)
                write_text(target / CARD_FILE, card)
                if self.log is not None:
                    self.log.plot(target)
