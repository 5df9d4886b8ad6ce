"""The batches of a stage, in order, from any position on; prepared in worker processes where asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from audioflamingo.audio.stored import path_of
from audioflamingo.datasets.conversations import DataRow, Dataset
from audioflamingo.errors import AudioError, DataError
from audioflamingo.files import FileWatch
from audioflamingo.training.batch_sampler import cut_batches, estimate_tokens, plan_epoch
from audioflamingo.training.batches import Batch, BatchEncoder, ctc_targets
from audioflamingo.training.training_config import BatchConfig, StageConfig

logger = logging.getLogger(__name__)
DATA_STREAM = 1  # keeps the chance of batches apart from that of their order


class StageData:
    """Rows of a stage and their batches.

    Args:
        datasets: all training sets.
        stage: leaves out rows that are too long for it, and rows without transcript where only CTC is trained.
        batch: limits of a batch.
        seed: of the run, and number of the stage.
        skip_bad: report audio that cannot be read and go on, in place of an error.
        watch: knows the audio files as they were when the run began.

    Raises:
        DataError: nothing is left.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        stage: StageConfig,
        batch: BatchConfig,
        seed: Sequence[int],
        skip_bad: bool,
        watch: FileWatch,
    ) -> None:
        self.batch = batch
        self.seed = seed
        self.skip_bad = skip_bad
        self.watch = watch
        self.rows: list[DataRow] = []
        self.sets: list[tuple[int, float]] = []
        for dataset in datasets:
            rows = [row for row in dataset.rows if _fits(row, stage)]
            self.rows += rows
            self.sets.append((len(rows), dataset.weight))
        if not self.rows:
            raise DataError(
                f"no row is left for stage {stage.name!r}: check max_duration_s, and transcripts for CTC."
            )
        self.tokens = [estimate_tokens(row.duration_s, row.num_characters) for row in self.rows]
        self.audio_s = [row.duration_s for row in self.rows]

    def plan(self, epoch: int) -> list[list[int]]:
        """Row numbers of each batch of an epoch."""
        mixed = self.seed[0] * 1000 + self.seed[1]
        return plan_epoch(self.tokens, self.audio_s, self.sets, self.batch, mixed, epoch)

    def steps_of(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return len(self.plan(epoch)) // self.batch.batches_per_step

    def steps(
        self, epoch: int, first: int, encoder: BatchEncoder, rank: int, num_processes: int, num_workers: int
    ) -> Iterator[list[Batch]]:
        """Yields this process's batches of each step of an epoch, from step `first` on."""
        loader = torch.utils.data.DataLoader(
            _Steps(self, self.plan(epoch), epoch, first, encoder, rank, num_processes),
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator(),  # the global one belongs to dropout
        )
        return iter(loader)


class _Steps(torch.utils.data.Dataset[Any]):
    """Step number -> this process's batches."""

    def __init__(
        self,
        data: StageData,
        plan: list[list[int]],
        epoch: int,
        first: int,
        encoder: BatchEncoder,
        rank: int,
        num_processes: int,
    ) -> None:
        self.data, self.plan, self.epoch, self.first = data, plan, epoch, first
        self.encoder, self.rank, self.num_processes = encoder, rank, num_processes

    def __len__(self) -> int:
        return len(self.plan) // self.data.batch.batches_per_step - self.first

    def __getitem__(self, index: int) -> list[Batch]:
        per_step = self.data.batch.batches_per_step
        start = (self.first + index) * per_step
        numbers = range(start + self.rank, start + per_step, self.num_processes)
        return [self._load(number) for number in numbers]

    def _load(self, number: int) -> Batch:
        rows = [self.data.rows[row] for row in self.plan[number]]
        self.data.watch.check(path_of(clip) for row in rows for clip in row.audio)
        seed = [*self.data.seed, DATA_STREAM, self.epoch, number]
        try:
            return self.encoder(rows, seed)
        except AudioError:
            if not self.data.skip_bad:
                raise DataError(_describe_bad(rows, self.encoder)) from None
        usable = [row for row in rows if not (reason := _reason(row, self.encoder)) or _report(row, reason)]
        if not usable:
            raise DataError(f"no audio of a whole batch can be read; the first row is {rows[0].place}.")
        return self.encoder(usable, seed)


def fixed_batches(rows: Sequence[DataRow], batch: BatchConfig) -> list[list[DataRow]]:
    """Batches of validation rows, by length; the same every time."""
    ordered = sorted(rows, key=lambda row: (row.duration_s, row.place))
    tokens = [estimate_tokens(row.duration_s, row.num_characters) for row in ordered]
    cut = cut_batches(range(len(ordered)), tokens, [row.duration_s for row in ordered], batch)
    return [[ordered[i] for i in numbers] for numbers in cut]


def _fits(row: DataRow, stage: StageConfig) -> bool:
    if stage.max_duration_s is not None and row.duration_s > stage.max_duration_s:
        return False
    return stage.answer_weight > 0 or bool(ctc_targets(row.transcript or ""))


def _reason(row: DataRow, encoder: BatchEncoder) -> str | None:
    """Why a row's audio cannot be read, or None."""
    try:
        encoder([row])
    except AudioError as error:
        return str(error)
    return None


def _report(row: DataRow, reason: str) -> bool:
    logger.warning("skipped %s: %s", row.place, reason)
    return False


def _describe_bad(rows: Sequence[DataRow], encoder: BatchEncoder) -> str:
    bad = [f"{row.place}: {reason}" for row in rows if (reason := _reason(row, encoder))]
    return " ".join(bad) + " Repair the rows, or set on_bad_row: skip."
