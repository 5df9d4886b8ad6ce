"""`af3 train` and `af3 evaluate`: the way into the trainer, which is imported only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audioflamingo.cli.options import DebugOption, DeviceOption, Dtype, DtypeOption, QuietOption


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the file; may be repeated."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget an earlier run in the output folder.")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model from a configuration file.

    After an interruption the same command goes on where it was.

    \b
    Examples:
      af3 train recipes/nano/train.yaml
      af3 train my.yaml --set stages.0.max_minutes=20
    """
    from audioflamingo.cli.terminal import Terminal
    from audioflamingo.training.__main__ import run_training

    Terminal.show(run_training(str(config), overrides or [], fresh=fresh, quiet=quiet) + "\n")


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="nano, a hub id, or a folder.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL of conversations, or NVIDIA's JSON.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="For items.jsonl, summary.json and plots.")
    ],
    audio_dir: Annotated[
        str | None, typer.Option(help="What audio paths are relative to; by default the folder of DATA.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Only a fixed random sample of so many rows.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that run together.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model: word error rate, multiple-choice accuracy, exact match.

    After an interruption the same command goes on where it was.

    \b
    Example:
      af3 evaluate nano test.jsonl -o results/
    """
    from audioflamingo.cli.terminal import Terminal
    from audioflamingo.evaluation.__main__ import run_evaluation

    table = run_evaluation(
        model,
        data,
        str(output_dir),
        audio_dir=audio_dir,
        max_rows=max_rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=None if dtype is Dtype.AUTO else dtype.value,
        device=device,
        overwrite=overwrite,
        progress=not quiet,
    )
    Terminal.show(table + "\n")
