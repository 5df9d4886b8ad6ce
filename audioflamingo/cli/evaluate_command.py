"""`af3 evaluate`: scores of a model on a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audioflamingo.cli.flags import QuietOptions, is_given, with_flags
from audioflamingo.cli.model_loading import AdaptedModelOptions, load_with_adapter
from audioflamingo.cli.terminal import Terminal
from audioflamingo.evaluation.evaluation_options import EvaluationOptions

if TYPE_CHECKING:
    from audioflamingo.evaluation import Evaluation


@with_flags
def evaluate(
    ctx: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] DATA",
            help="JSONL of conversations, or NVIDIA's JSON. A model may stand before it, in place of --model.",
            show_default=False,
        ),
    ],
    *,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="For items.jsonl, summary.json and plots.")
    ],
    audio_dir: Annotated[
        str | None, typer.Option(help="What audio paths are relative to; by default the folder of DATA.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Only a fixed random sample of so many rows.")
    ] = None,
    options: EvaluationOptions,
    model: AdaptedModelOptions,
    screen: QuietOptions,
) -> None:
    """Measure a model: word error rate, multiple-choice accuracy, exact match.

    After an interruption the same command goes on where it was.

    \b
    Examples:
      af3 evaluate test.jsonl -o results/
      af3 evaluate test.jsonl -o results/ --model ./checkpoint --max-rows 500
    """
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.evaluation import evaluate as run_evaluation

    if len(arguments) > 2:
        raise typer.BadParameter(f"one model and one file of data, got {len(arguments)} names.")
    if len(arguments) == 2:
        if is_given(ctx, "model"):
            raise typer.BadParameter(f"two models: {arguments[0]!r} and --model {model.model!r}.")
        model = dataclasses.replace(model, model=arguments[0])
    loaded, processor, name = load_with_adapter(model)
    with Terminal.progress(None, not screen.quiet) as bar:
        result = run_evaluation(
            loaded,
            processor,
            DatasetConfig(arguments[-1], audio_dir=audio_dir, max_rows=max_rows),
            output_dir=output_dir,
            progress=lambda done, total: bar.update(done, f"{done}/{total}", total),
            adapter=name,
            **dataclasses.asdict(options),
        )
    Terminal.show(format_scores(result))


def format_scores(result: Evaluation) -> str:
    """The scores as a table."""
    lines = [f"{'task':24} {'items':>6} {'WER':>7} {'choice':>7} {'exact':>7}"]
    for name, summary in {**result.by_task, "all": result.summary}.items():
        values = (summary.wer, summary.choice_accuracy, summary.exact_match)
        cells = " ".join(f"{'-' if value is None else format(value, '.4f'):>7}" for value in values)
        lines.append(f"{name:24.24} {summary.num_items:6} {cells}")
    return "\n".join(lines) + "\n"
