"""`af3 train`: the way into the trainer, which is imported only when asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from audioflamingo.cli.failures import EXIT_INTERRUPTED
from audioflamingo.cli.flags import QuietOptions, with_flags
from audioflamingo.cli.terminal import Terminal


@with_flags
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how.")],
    *,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the file; may be repeated."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget an earlier run in the output folder.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Train nothing: read the data, count tokens, estimate memory and time, show three rows.",
        ),
    ] = False,
    screen: QuietOptions,
) -> None:
    """Train a model from a configuration file.

    After an interruption the same command goes on where it was. On several GPUs each process runs it:
    `accelerate launch -m audioflamingo.cli train CONFIG.yaml`.

    \b
    Examples:
      af3 train recipes/lora.yaml
      af3 train my.yaml --set stages.0.max_minutes=20
      af3 train my.yaml --check
    """
    from audioflamingo.training.checking import check_training
    from audioflamingo.training.trainer import train as run_training
    from audioflamingo.training.training_config import load_config

    logging.basicConfig(format="%(levelname)s %(message)s")
    settings = load_config(str(config), overrides or [])
    if check:
        Terminal.show(str(check_training(settings)))
        return
    try:
        result = run_training(settings, fresh=fresh, show_progress=not screen.quiet)
    except KeyboardInterrupt:
        Terminal.say("stopped; a checkpoint is written, and the same command goes on from there.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    best = ""
    if result.best is not None:
        best = f"; best {result.best:.4f} at step {result.best_step} in {result.best_dir}"
    Terminal.show(f"{result.step} steps done; the model is in {result.last_dir}{best}\n")
