"""`af3 merge`: an adapter folded into its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audioflamingo.cli.flags import QuietOptions, with_flags
from audioflamingo.cli.model_loading import ModelOptions, load
from audioflamingo.cli.terminal import Terminal
from audioflamingo.errors import ArgumentError


@with_flags
def merge(
    output: Annotated[Path, typer.Argument(help="Folder to write the merged model to.", show_default=False)],
    *,
    adapter: Annotated[
        Path, typer.Option(help="Folder of the adapter.", metavar="FOLDER", show_default=False)
    ],
    model: ModelOptions,
    screen: QuietOptions,
) -> None:
    """Fold an adapter into its model and write that as a whole checkpoint, which needs the adapter no more.

    \b
    Example:
      af3 merge merged/ --adapter audio-flamingo-3-hf/think --model audio-flamingo-3-hf
    """
    from audioflamingo.hub import resolve_folder

    if output.exists() and output.resolve() == resolve_folder(model.model).resolve():
        raise ArgumentError(
            f"{output} is the model itself, which is never changed: merge into another folder."
        )
    loaded, processor = load(model)
    loaded.load_adapter(adapter, "merged")
    loaded.merge_adapter("merged")
    loaded.save_pretrained(output)
    processor.save_pretrained(output)
    if not screen.quiet:
        Terminal.say(f"{output}: {model.model} with {adapter} in it")
