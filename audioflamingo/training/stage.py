"""One stage of a run: its data, optimizer and loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from audioflamingo.datasets.conversations import AudioOfRow, DataRow, Dataset
from audioflamingo.errors import NonFiniteLossError
from audioflamingo.training.batches import Batch, BatchEncoder
from audioflamingo.training.build_cache import prepare_cache
from audioflamingo.training.display import StageBar
from audioflamingo.training.learning_rate import Schedule
from audioflamingo.training.parts import base_rate, build_optimizer, frozen_layers, select_parameters
from audioflamingo.training.resume import LoadedCheckpoint
from audioflamingo.training.steps import StageData
from audioflamingo.training.training_config import StageConfig
from audioflamingo.training.training_run import Run
from audioflamingo.training.validation import Validation, validate


class StageRun:
    """One stage of a run: its data, optimizer and loop."""

    def __init__(self, run: Run, index: int, loaded: LoadedCheckpoint | None) -> None:
        self.shared, self.index = run, index
        self.config, self.accelerator, self.progress = run.config, run.accelerator, run.progress
        self.stage: StageConfig = self.config.stages[index]
        self.name = self.stage.name or f"stage {index + 1}"
        if loaded is None:
            self.progress.begin_stage(index)
        batch = self.stage.batch or self.config.batch
        datasets, validation_rows, cache = run.datasets, run.validation_rows, None
        num_layers = run.model.config.audio_config.num_hidden_layers
        if self.config.feature_cache is not None and frozen_layers(self.stage, num_layers) > 0:
            cache = prepare_cache(run)
            datasets, validation_rows = _readable(datasets, validation_rows, set(cache.failed))
        self.data = StageData(
            datasets,
            self.stage,
            batch,
            (self.config.seed, index),
            skip_bad=self.config.data.on_bad_row == "skip",
            watch=run.watch,
        )
        uses_ctc, uses_answers = self.stage.ctc_weight > 0, self.stage.answer_weight > 0
        encoder, plain_encoder = (
            BatchEncoder(run.processor, augmentation, cache, uses_ctc, uses_answers)
            for augmentation in (self.config.augmentation, None)
        )
        self.encoder = encoder
        self.validation = Validation(validation_rows, batch, plain_encoder, self.config.validation, run.watch)
        self.stored_names = run.stored_names(index)
        select_parameters(run.model, self.stage)
        if run.module.ctc_head is not None:
            run.module.ctc_head.requires_grad_(uses_ctc)
        self.module, self.optimizer = self.accelerator.prepare(
            run.module, build_optimizer(run.module, self.stage, self.config.optimizer)
        )
        if loaded is not None:
            loaded.restore_optimizer(self.module, self.torch_optimizer, self.accelerator)
        self.schedule = Schedule.of(self.stage, self.data.steps_of(0))

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer inside accelerate's."""
        return self.optimizer.optimizer

    def run(self) -> None:
        """Trains the stage to its end."""
        self._set_training_mode()
        last_time = time.perf_counter()
        with StageBar(self.name, self.schedule, self.shared.show_progress) as bar:
            for batches in self._steps():
                values = self._step(batches, time.perf_counter() - last_time)
                last_time = time.perf_counter()
                bar.update(self.progress, values)
                is_over = self.schedule.is_over(self.progress.stage_step, self.progress.stage_s)
                self._log(values, is_over)
                every = self.config.validation.every_steps
                if is_over or (every is not None and self.progress.stage_step % every == 0):
                    self._validate(bar)
                is_stopped = values["stop"] > 0
                if is_over:
                    break
                if is_stopped or self.progress.stage_step % self.config.checkpoint_every_steps == 0:
                    self.shared.save_checkpoint(self.module, self.torch_optimizer, self.stored_names)
                if is_stopped:
                    raise KeyboardInterrupt
        self.shared.save_model("last", self.module)
        self._finish()

    def _finish(self) -> None:
        """Unwraps the module and marks the stage as done."""
        self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.begin_stage(self.index + 1)
        next_names = self.shared.stored_names(min(self.index + 1, len(self.config.stages) - 1))
        self.shared.save_checkpoint(self.shared.module, None, next_names)
        self.accelerator.free_memory()

    def _steps(self) -> Iterator[list[Batch]]:
        """Batches of one step after the other, over epochs, from where the run is."""
        rank, num = self.accelerator.process_index, self.accelerator.num_processes
        while True:
            epoch, first = self.progress.epoch, self.progress.epoch_step
            workers = self.config.data.num_workers
            for batches in self.data.steps(epoch, first, self.encoder, rank, num, workers):
                self.progress.epoch_step += 1
                yield batches
            self.progress.epoch, self.progress.epoch_step = epoch + 1, 0

    def _step(self, batches: Sequence[Batch], waited_s: float) -> dict[str, Any]:
        """One optimizer step over all processes.

        The losses are means over all labelled tokens, and characters, of the step, however they are spread over
        batches and processes.
        """
        start = time.perf_counter()
        stage, num = self.stage, self.accelerator.num_processes
        totals = self._reduce([sum(b.num_labels for b in batches), sum(b.num_characters for b in batches)])
        num_labels, num_characters = (value or 1.0 for value in totals)  # a set's weight may be below 1
        answer, ctc = 0.0, 0.0
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module):
                on_device = batch.to(self.accelerator.device)
                losses = self.module(on_device, stage.answer_weight > 0, stage.ctc_layer)
                total: Any = 0.0
                if "answer" in losses:
                    total = total + stage.answer_weight * losses["answer"] / num_labels
                    answer += losses["answer"].item()
                if "ctc" in losses:
                    total = total + stage.ctc_weight * losses["ctc"] / num_characters
                    ctc += losses["ctc"].item()
                self.accelerator.backward(total * num)
        measured = [answer, ctc, sum(len(b.ids) for b in batches), sum(b.audio_s for b in batches)]
        is_main = self.accelerator.is_main_process
        clock = time.perf_counter() - start + waited_s
        answer, ctc, num_rows, audio_s, clock, stop = self._reduce(
            [*measured, clock if is_main else 0.0, float(self.shared.stop_signal.is_set)]
        )
        if not math.isfinite(answer + ctc):
            self._fail("the loss", batches)
        norm = self._clip(batches)
        factor = self.schedule.rate_factor(self.progress.stage_step, self.progress.stage_s)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = base_rate(group["part"], stage) * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.stage_step += 1
        self.progress.stage_s += clock
        values = {
            "loss": stage.answer_weight * answer / num_labels + stage.ctc_weight * ctc / num_characters,
            "answer_loss": answer / num_labels if stage.answer_weight else None,
            "ctc_loss": ctc / num_characters if stage.ctc_weight else None,
            "grad_norm": norm,
            "learning_rates": {part: rate * factor for part, rate in stage.learning_rates.items()},
            "rows_per_s": num_rows / clock,
            "audio_s_per_s": audio_s / clock,
        }
        return {**values, "stop": stop}

    def _clip(self, batches: Sequence[Batch]) -> float:
        """Clips the gradient; returns its norm before."""
        limit = math.inf if self.stage.max_grad_norm is None else self.stage.max_grad_norm
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            self._fail("the gradient", batches)
        return norm

    def _fail(self, what: str, batches: Sequence[Batch]) -> None:
        from accelerate.utils import gather_object

        ids = list(gather_object([row_id for batch in batches for row_id in batch.ids]))
        step = self.progress.step + 1
        raise NonFiniteLossError(
            f"{what} of step {step} ({self.name}) is not finite. Rows: {', '.join(ids)}. The last checkpoint is from "
            "before; look at these rows, lower the learning rate, or use precision: float32.",
            ids,
        )

    def _reduce(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return list(map(float, values))
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(tensor)
        return list(tensor.tolist())

    def _log(self, values: dict[str, Any], is_last: bool) -> None:
        """Writes a line every few steps, and one for the last: a stage may be shorter than those few."""
        is_due = is_last or self.progress.step % self.config.log_every_steps == 0
        if self.shared.log is not None and is_due:
            where = {
                "stage": self.name,
                "epoch": self.progress.epoch,
                "stage_s": round(self.progress.stage_s, 2),
            }
            self.shared.log.write("train", self.progress.step, {**where, **values, "stop": None})

    def _validate(self, bar: StageBar) -> None:
        """Measures, logs, and saves the model if it is the best so far."""
        if not self.validation.rows:
            return
        scores = validate(
            self.validation,
            self.module,
            self.shared.model,
            self.shared.processor,
            self.accelerator,
            self.stage,
        )
        self._set_training_mode()
        if self.shared.log is not None:
            self.shared.log.write("validation", self.progress.step, {"stage": self.name, **scores})
            self.shared.log.plot()
        value = scores.get(self.config.best_metric)
        if value is not None and self.stage.answer_weight > 0:
            best = self.progress.best
            sign = -1 if self.config.best_metric == "accuracy" else 1
            if best is None or sign * value < sign * best:
                self.progress.best, self.progress.best_step = value, self.progress.step
                self.shared.save_model("best", self.module)
        bar.show(scores)

    def _set_training_mode(self) -> None:
        """Training mode, but for parts that are frozen as a whole."""
        self.module.train()
        if "encoder" not in self.stage.learning_rates:
            self.shared.model.model.audio_tower.eval()


def _readable(
    datasets: Sequence[Dataset], validation_rows: Sequence[DataRow], failed: set[AudioOfRow]
) -> tuple[Sequence[Dataset], Sequence[DataRow]]:
    """The rows without those that have a clip among the `failed`."""
    if not failed:
        return datasets, validation_rows
    kept = [Dataset([row for row in d.rows if not failed & set(row.audio)], d.weight) for d in datasets]
    return kept, [row for row in validation_rows if not failed & set(row.audio)]
