"""Validation during training: loss over fixed batches, word error rate and accuracy over a fixed sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from audioflamingo.audio.stored import path_of
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.evaluation import answer_rows, summarize
from audioflamingo.files import FileWatch
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.batches import BatchEncoder
from audioflamingo.training.steps import fixed_batches
from audioflamingo.training.training_config import BatchConfig, StageConfig, ValidationConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

GENERATION_BATCH = 16


@dataclass(frozen=True)
class Validation:
    """What validation runs on: rows, their batches, how they are encoded, settings, and the audio as it was."""

    rows: Sequence[DataRow]
    batch: BatchConfig
    encoder: BatchEncoder
    config: ValidationConfig
    watch: FileWatch

    def check(self, rows: Sequence[DataRow]) -> None:
        """Makes sure that the audio of rows is what it was.

        Raises:
            DataError: it is not.
        """
        self.watch.check(path_of(clip) for row in rows for clip in row.audio)

    def batches(self) -> list[list[DataRow]]:
        """At most `max_batches` batches, spread evenly over all lengths."""
        batches = fixed_batches(self.rows, self.batch)
        if self.config.max_batches is None or len(batches) <= self.config.max_batches:
            return batches
        chosen = np.linspace(0, len(batches) - 1, self.config.max_batches).round().astype(int)
        return [batches[i] for i in sorted(set(chosen.tolist()))]

    def sample(self) -> list[DataRow]:
        """Rows to be answered, spread evenly over the data."""
        num = min(self.config.generate_rows, len(self.rows))
        return [
            self.rows[i]
            for i in sorted(set(np.linspace(0, len(self.rows) - 1, num).round().astype(int).tolist()))
        ]


@torch.no_grad()
def validate(
    validation: Validation,
    module: torch.nn.Module,
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    accelerator: Accelerator,
    stage: StageConfig,
) -> dict[str, float | None]:
    """Measures `loss`, `ctc_loss`, `wer`, `choice_accuracy`, `exact_match` and `accuracy`; each where it applies.

    All processes call it; each does its share. Answers are generated in the weights' dtype, on DDP or one process
    only: sharded weights (FSDP) give the losses alone.

    Raises:
        DataError: an audio file is not what it was when the run began.
    """
    rank, num = accelerator.process_index, accelerator.num_processes
    module.eval()
    uses_answers = stage.answer_weight > 0
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for rows in validation.batches()[rank::num]:
        validation.check(rows)
        batch = validation.encoder(rows)
        losses = module(batch.to(accelerator.device), uses_answers, stage.ctc_layer)
        sums[0] += losses["answer"].item() if "answer" in losses else 0.0
        sums[1] += batch.num_labels
        sums[2] += losses["ctc"].item() if "ctc" in losses else 0.0
        sums[3] += batch.num_characters
    items = []
    if uses_answers and validation.config.generate_rows and accelerator.distributed_type != "FSDP":
        model.eval()
        options: dict[str, Any] = {
            "max_new_tokens": validation.config.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
        }
        sample = validation.sample()[rank::num]
        validation.check(sample)
        items = [item for _, item in answer_rows(model, processor, sample, GENERATION_BATCH, **options)]
    if num > 1:
        torch.distributed.all_reduce(sums)
        from accelerate.utils import gather_object

        items = list(gather_object(items))
    answer, num_labels, ctc, num_characters = sums.tolist()
    scores: dict[str, float | None] = {
        "loss": answer / num_labels if num_labels else None,
        "ctc_loss": ctc / num_characters if num_characters else None,
    }
    if items:
        summary = summarize(items).to_dict()
        scores |= {name: summary[name] for name in ("wer", "choice_accuracy", "exact_match", "accuracy")}
    return scores
