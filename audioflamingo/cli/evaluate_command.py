"""`af3 evaluate`: scores of a model on a benchmark or data set, and two runs compared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audioflamingo.cli.cluster_job import Engine, PlacedModelOptions, cluster_load, for_device
from audioflamingo.cli.failures import EXIT_FAILED
from audioflamingo.cli.flags import QuietOptions, is_given, refuse_without, with_flags
from audioflamingo.cli.model_loading import ADAPTER_NAME, load_with_adapter
from audioflamingo.cli.terminal import Terminal
from audioflamingo.corpus import ClusterOptions, evaluate_on_cluster
from audioflamingo.evaluation.evaluation_options import EvaluationOptions
from audioflamingo.fields import option

if TYPE_CHECKING:
    from audioflamingo.evaluation import Evaluation, Summary


@dataclass(frozen=True)
class DataOptions:
    """Which part of the data, and where its audio lies."""

    audio_dir: str | None = option(
        None, "What audio paths are relative to; by default the folder of DATA.", group="Data"
    )
    max_rows: int | None = option(
        None, "Only a fixed random sample of so many rows.", at_least=1, group="Data"
    )


@with_flags
def evaluate(
    ctx: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] DATA",
            help="JSONL of conversations, NVIDIA's JSON, or with --suite a benchmark's file, folder or hub id. A "
            "model may stand before it, in place of --model.",
            show_default=False,
        ),
    ] = None,
    *,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="For items, scores and the report.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B",
            help="Say what changed between the runs in two output folders, and whether by chance.",
        ),
    ] = None,
    data: DataOptions,
    options: EvaluationOptions,
    model: PlacedModelOptions,
    screen: QuietOptions,
) -> None:
    """Measure a model: word error rate, multiple-choice accuracy, exact match.

    After an interruption the same command goes on where it was.

    \b
    Examples:
      af3 evaluate test.jsonl -o results/
      af3 evaluate --suite mmar MMAR/ -o mmar/ --model nvidia/audio-flamingo-3-hf
      af3 evaluate --suite librispeech LibriSpeech/ -o ls/ --engine ray --address 10.0.0.1:6379
      af3 evaluate --compare mmar/ mmar-official/
    """
    if compare is not None:
        if arguments:
            raise typer.BadParameter("--compare reads two output folders and takes no DATA.")
        from audioflamingo.evaluation import compare_runs

        Terminal.show(str(compare_runs(*compare)))
        return
    path, model = _read_arguments(ctx, arguments or [], model)
    if output_dir is None:
        raise typer.BadParameter("a folder for the results is needed.", param_hint="--output-dir")
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.evaluation import evaluate as run_evaluation

    if model.engine is Engine.RAY:
        name = None if model.adapter is None else ADAPTER_NAME
        run: Callable[..., Evaluation] = functools.partial(
            evaluate_on_cluster, cluster_load(model), cluster=for_device(model.cluster, model)
        )
    else:
        refuse_without(ctx, ClusterOptions, "--engine ray")
        loaded, processor, name = load_with_adapter(model)
        run = functools.partial(run_evaluation, loaded, processor)
    with Terminal.progress(None, not screen.quiet) as bar:
        result = run(
            DatasetConfig(path, **dataclasses.asdict(data)),
            output_dir=output_dir,
            progress=lambda done, total: bar.update(done, f"{done}/{total}", total),
            adapter=name,
            **dataclasses.asdict(options),
        )
    show_result(result, output_dir, screen)


def _read_arguments(
    ctx: typer.Context, names: list[str], model: PlacedModelOptions
) -> tuple[str, PlacedModelOptions]:
    """The data, and the model that may stand before it."""
    if not 1 <= len(names) <= 2:
        raise typer.BadParameter(f"one model and one data set, got {len(names)} names.")
    if len(names) == 2:
        if is_given(ctx, "model"):
            raise typer.BadParameter(f"two models: {names[0]!r} and --model {model.model!r}.")
        model = dataclasses.replace(model, model=names[0])
    return names[-1], model


def show_result(result: Evaluation, output_dir: Path, screen: QuietOptions) -> None:
    """Prints scores; says what could not be read or asked.

    Raises:
        typer.Exit: questions could not be asked.
    """
    Terminal.show(format_scores(result))
    failed = [item for item in result.items if item.error is not None]
    for item in failed:
        Terminal.say(f"error: {item.id}: {item.error}")
    if result.summary.num_unparsed and not screen.quiet:
        Terminal.say(
            f"{result.summary.num_unparsed} answers name no option and count as wrong: see {output_dir}."
        )
    if failed:
        Terminal.say(
            f"{len(failed)} questions could not be asked and count as wrong; the same command asks them again."
        )
        raise typer.Exit(EXIT_FAILED)


def format_scores(result: Evaluation) -> str:
    """The scores as a table: all, and each group of which there are several."""
    lines = [f"{'':32} {'items':>6} {'WER':>7} {'choice':>7} {'exact':>7} {'official':>8}"]
    for name, parts in result.groups.items():
        if len(parts) > 1 or name == "task":
            lines += [_line(f"{name}: {value}", summary) for value, summary in parts.items()]
    lines.append(_line("all", result.summary))
    for label, interval in (
        ("WER", result.summary.wer_interval),
        ("right", result.summary.accuracy_interval),
    ):
        if interval is not None:
            lines.append(f"{label}: 95 % between {interval[0]:.4f} and {interval[1]:.4f}")
    return "\n".join(lines) + "\n"


def _line(name: str, summary: Summary) -> str:
    values = (summary.wer, summary.choice_accuracy, summary.exact_match)
    cells = " ".join(f"{'-' if value is None else format(value, '.4f'):>7}" for value in values)
    official = "-" if summary.official_accuracy is None else f"{summary.official_accuracy:.4f}"
    return f"{name:32.32} {summary.num_items:6} {cells} {official:>8}"
