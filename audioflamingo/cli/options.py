"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from audioflamingo.cli.failures import DEBUG, QUIET

DEFAULT_MODEL = "nano"
MODEL_VARIABLE = "AF3_MODEL"


def show_version(is_asked: bool) -> None:
    """Prints the version and exits."""
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"af3 {version('audioflamingo')}")
        raise typer.Exit


def _note(key: str) -> Any:
    def callback(ctx: typer.Context, value: bool) -> bool:
        if value:
            ctx.find_root().meta[key] = True
        return value

    return callback


class Dtype(StrEnum):
    """Dtype of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantization(StrEnum):
    """Scheme of smaller weights."""

    INT8 = "int8"
    INT4 = "int4"


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar=MODEL_VARIABLE,
        metavar="nano|ID|FOLDER",
        help="The built-in model, a hub id such as nvidia/audio-flamingo-3-hf, or a folder.",
        rich_help_panel="Model",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel="Model")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="auto: as stored, but float32 in place of float16 on a CPU.", rich_help_panel="Model"),
]
QuantizationOption = Annotated[
    Quantization | None,
    typer.Option(
        help="Make the weights smaller while loading, to run on the CPU; `af3 quantize` does it once and for all.",
        rich_help_panel="Model",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_note(QUIET),
        help="Print results and errors only.",
        rich_help_panel="Output",
    ),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say what is being done.", rich_help_panel="Output")
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_note(DEBUG), help="Show the traceback of an error.", rich_help_panel="Output"
    ),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer; by default the checkpoint's.", rich_help_panel="Answer"),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        min=0.0, help="Draw answers at random; 0 or nothing: the most likely one.", rich_help_panel="Answer"
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Makes random answers repeatable.", rich_help_panel="Answer")
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System message.", rich_help_panel="Answer")
]
OnLongOption = Annotated[
    str,
    typer.Option(
        metavar="truncate|error",
        help="What to do with a clip of more than 10 minutes.",
        rich_help_panel="Answer",
    ),
]


def answer_options(max_new_tokens: int | None, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """Keywords of `generate` for what was asked for; the rest is left to the checkpoint."""
    options: dict[str, Any] = {}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if temperature is not None:
        options["do_sample"] = temperature > 0
        if temperature > 0:
            options["temperature"] = temperature
    if seed is not None:
        options["seed"] = seed
    return options
