"""`af3 train --check`: reads the data as the run will, and says what the run will take. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from audioflamingo.checkpoint.pretrained import read_config
from audioflamingo.config import AUDIO_TOKENS_PER_S, CHUNK_LENGTH_S, IGNORED_LABEL
from audioflamingo.datasets.conversations import DataRow, Dataset, count_reasons
from audioflamingo.files import FileWatch
from audioflamingo.hub import resolve_folder
from audioflamingo.processor import AudioFlamingo3Processor, AutoProcessor
from audioflamingo.training.display import clock
from audioflamingo.training.estimate import empty_model, estimate_memory, estimate_step_s, measure_speed
from audioflamingo.training.learning_rate import Schedule
from audioflamingo.training.precision import resolve_precision
from audioflamingo.training.reading_data import read_data
from audioflamingo.training.steps import StageData
from audioflamingo.training.training_config import StageConfig, TrainingConfig

NUM_COUNTED = 2000  # rows whose tokens are counted; the rest is taken to be like them
NUM_SHOWN = 3
LEARNED = ("«", "»")


@dataclass(frozen=True)
class StageCheck:
    """What a stage will take: steps, bytes at its peak by purpose, seconds (None where the clock ends it)."""

    name: str
    num_trained: int
    num_steps: int | None
    memory: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class TrainingCheck:
    """What a run will train on and take.

    Attributes:
        datasets: of training, as they were read.
        num_audio_tokens, num_text_tokens, num_labels: of an epoch in which each row comes once.
        longest: tokens of the longest row that was counted, and where it is.
        stages: see their class.
        rows: some rows as the model sees them; what is learned stands between « and ».
    """

    datasets: Sequence[Dataset]
    num_audio_tokens: int
    num_text_tokens: int
    num_labels: int
    longest: tuple[int, str]
    stages: list[StageCheck] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [row for dataset in self.datasets for row in dataset.rows]
        hours = sum(row.duration_s for row in rows) / 3600
        skipped = [item for dataset in self.datasets for item in dataset.skipped]
        lines = [
            f"data: {len(rows)} rows, {hours:.2f} h of audio; {len(skipped)} left out",
            f"tokens: {self.num_audio_tokens} of audio, {self.num_text_tokens} of text, of which {self.num_labels} are "
            "learned",
            *(f"  left out: {number} {reason}" for reason, number in count_reasons(skipped)),
            f"longest row: {self.longest[0]} tokens, {self.longest[1]}",
        ]
        for stage in self.stages:
            total = sum(stage.memory.values())
            parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in stage.memory.items())
            steps = "until its minutes are over" if stage.num_steps is None else f"{stage.num_steps} steps"
            lines += [
                f"{stage.name}: {stage.num_trained / 1e6:.2f} M weights trained, {steps}, about {clock(stage.seconds)} "
                "on one device (good to a factor of two)",
                f"  memory about {_gigabytes(total)}: {parts}",
            ]
        lines.append(
            f"rows as the model sees them; what is learned stands between {LEARNED[0]} and {LEARNED[1]}:"
        )
        return "\n".join([*lines, *(f"\n{row}" for row in self.rows)]) + "\n"


def check_training(config: TrainingConfig) -> TrainingCheck:
    """Reads the data of a run, counts, and estimates; the model's weights are not loaded.

    Raises:
        ConfigError, DataError, CheckpointError: what the run itself would stop at before its first step.
    """
    folder = resolve_folder(config.model)
    model_config = read_config(folder)
    processor = AutoProcessor.from_pretrained(folder)
    datasets, _ = read_data(config, processor, model_config)
    check = _count(datasets, processor)
    is_cpu = config.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if is_cpu else "cuda")
    precision = resolve_precision(config.precision, is_cpu)
    model = empty_model(config, model_config)
    speed = measure_speed(device, precision)
    for number, stage in enumerate(config.stages):
        batch = stage.batch or config.batch
        planned = StageData(datasets, stage, batch, (config.seed, number), skip_bad=True, watch=FileWatch(()))
        memory = estimate_memory(config, model, stage, precision)
        per_epoch = planned.steps_of(0)
        num_steps = Schedule.of(stage, per_epoch).num_steps
        windows = sum(np.ceil(np.array(planned.audio_s) / CHUNK_LENGTH_S)) / per_epoch
        step_s = estimate_step_s(config, model, stage, sum(planned.tokens) / per_epoch, float(windows), speed)
        check.stages.append(
            StageCheck(
                stage.name or f"stage {number + 1}",
                sum(p.numel() for p in model.parameters() if p.requires_grad),
                num_steps,
                memory,
                _seconds(stage, num_steps, step_s),
            )
        )
    return check


def _seconds(stage: StageConfig, num_steps: int | None, step_s: float) -> float:
    by_clock = float("inf") if stage.max_minutes is None else 60 * stage.max_minutes
    return by_clock if num_steps is None else min(by_clock, num_steps * step_s)


def _count(datasets: Sequence[Dataset], processor: AudioFlamingo3Processor) -> TrainingCheck:
    """Tokens of the rows, of all or of an even choice of them, and the rows that are shown."""
    rows = [row for dataset in datasets for row in dataset.rows]
    places = np.linspace(0, len(rows) - 1, min(len(rows), NUM_COUNTED)).round().astype(int)
    chosen = [rows[place] for place in sorted(set(places.tolist()))]
    num_text, num_labels, longest = 0, 0, (0, "")
    for row in chosen:
        text = processor.training_text(row.messages)
        assert text.labels is not None
        num_tokens = len(text.token_ids) - text.num_clips
        num_text += num_tokens
        num_labels += int((text.labels[1:] != IGNORED_LABEL).sum())
        longest = max(longest, (num_tokens + audio_tokens(row), row.place))
    share = len(rows) / len(chosen)
    shown = [
        chosen[i]
        for i in sorted(set(np.linspace(0, len(chosen) - 1, NUM_SHOWN).round().astype(int).tolist()))
    ]
    return TrainingCheck(
        datasets,
        sum(map(audio_tokens, rows)),
        round(num_text * share),
        round(num_labels * share),
        longest,
        rows=[show_row(row, processor) for row in shown],
    )


def audio_tokens(row: DataRow) -> int:
    """Audio tokens of a row, by its stated length."""
    return round(row.duration_s * AUDIO_TOKENS_PER_S)


def show_row(row: DataRow, processor: AudioFlamingo3Processor) -> str:
    """A row as the model sees it: all of its text, control tokens too, and what is learned marked."""
    text = processor.training_text(row.messages)
    assert text.labels is not None
    parts, start = [f"{row.place} ({audio_tokens(row)} audio tokens)\n"], 0
    is_learned = (text.labels != IGNORED_LABEL).tolist()
    for end in range(1, len(is_learned) + 1):
        if end == len(is_learned) or is_learned[end] != is_learned[start]:
            piece = processor.tokenizer.decode(text.token_ids[start:end].tolist(), skip_special_tokens=False)
            parts.append(f"{LEARNED[0]}{piece}{LEARNED[1]}" if is_learned[start] else str(piece))
            start = end
    return "".join(parts)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
