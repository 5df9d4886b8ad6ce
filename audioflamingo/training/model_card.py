"""A draft of a model card for what a run saved: data, settings, scores, curves, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audioflamingo.datasets.conversations import DataRow, Dataset
from audioflamingo.training.training_config import StageConfig, TrainingConfig

CARD_FILE = "README.md"
_SCORES = ("loss", "wer", "choice_accuracy", "exact_match", "accuracy")


def model_card(
    config: TrainingConfig,
    datasets: Sequence[Dataset],
    validation_rows: Sequence[DataRow],
    entries: Sequence[dict[str, Any]],
    step: int,
    is_adapter: bool,
) -> str:
    """The card as Markdown, with the head that the hub reads.

    Args:
        config: of the run.
        datasets: what was read for training. Only names of files are shown, not where they lie.
        validation_rows: what was read for validation.
        entries: lines of the run's log.
        step: of the weights that it is about.
        is_adapter: whether what is saved needs the base model.
    """
    name = Path(config.output_dir).name
    head = ["---", f"base_model: {json.dumps(config.model)}", "pipeline_tag: audio-text-to-text"]
    head += [f"library_name: {'peft' if is_adapter else 'audioflamingo'}"]
    head += ["tags:", "- audio-flamingo-3", *(["- lora"] if is_adapter else []), "---"]
    use = (
        'model = AudioFlamingo3ForConditionalGeneration.from_pretrained(BASE)\nmodel.load_adapter(FOLDER, "own")'
        if is_adapter
        else "model = AudioFlamingo3ForConditionalGeneration.from_pretrained(FOLDER)"
    )
    sections = [
        "\n".join(head),
        f"# {name}\n\nA draft: say what it is for, what it must not be used for, and under which licence.",
        f"## Use\n\n```python\nfrom audioflamingo import AudioFlamingo3ForConditionalGeneration\n\n{use}\n```",
        "## Data\n\n" + _table(("file", "rows", "hours of audio", "weight"), _data_rows(config, datasets)),
        f"Validation: {len(validation_rows)} rows, {_hours(validation_rows):.2f} h.",
        "## Training\n\n"
        + _table(("stage", "trained, at which rate", "length", "batch"), _stage_rows(config)),
        _settings(config),
        f"## Scores\n\nOf the rows of validation; these weights are from step {step}.\n\n" + _scores(entries),
        "![curves](curves.png)",
    ]
    return "\n\n".join(sections) + "\n"


def _hours(rows: Sequence[DataRow]) -> float:
    return sum(row.duration_s for row in rows) / 3600


def _data_rows(config: TrainingConfig, datasets: Sequence[Dataset]) -> list[tuple[str, ...]]:
    pairs = zip(config.data.train, datasets, strict=True)
    return [
        (Path(item.path).name, str(len(d.rows)), f"{_hours(d.rows):.2f}", f"{d.weight:g}")
        for item, d in pairs
    ]


def _stage_rows(config: TrainingConfig) -> list[tuple[str, ...]]:
    return [
        (
            stage.name or str(number),
            ", ".join(f"{part} {rate:g}" for part, rate in stage.learning_rates.items()),
            _length(stage),
            str((stage.batch or config.batch).batches_per_step),
        )
        for number, stage in enumerate(config.stages, start=1)
    ]


def _length(stage: StageConfig) -> str:
    limits = ((stage.max_steps, "steps"), (stage.max_epochs, "epochs"), (stage.max_minutes, "minutes"))
    return ", ".join(f"at most {limit:g} {unit}" for limit, unit in limits if limit is not None)


def _settings(config: TrainingConfig) -> str:
    lora = f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}; " if config.uses_lora else ""
    base = f"base in {config.quantization}; " if config.quantization is not None else ""
    return f"{lora}{base}optimizer {config.optimizer}; precision {config.precision}; seed {config.seed}."


def _scores(entries: Sequence[dict[str, Any]]) -> str:
    measured = [entry for entry in entries if entry["kind"] == "validation"]
    names = [name for name in _SCORES if any(entry.get(name) is not None for entry in measured)]
    if not names:
        return "None were measured."
    rows = [
        (str(entry["step"]), *("" if entry.get(name) is None else f"{entry[name]:.4f}" for name in names))
        for entry in measured
    ]
    return _table(("step", *names), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
