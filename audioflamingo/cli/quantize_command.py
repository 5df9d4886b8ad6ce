"""`af3 quantize`: writes a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from audioflamingo.cli.flags import QuietOptions, with_flags
from audioflamingo.cli.info_command import format_size
from audioflamingo.cli.inputs import Input, find_inputs
from audioflamingo.cli.model_loading import MODEL_KINDS, Quantization
from audioflamingo.cli.terminal import Terminal


@with_flags
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_KINDS)],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    scheme: Annotated[
        Quantization,
        typer.Option(
            help="int8: half the size of bfloat16, nearly the same answers. int4: a quarter. fp8: as large as int8, "
            "for GPUs that multiply in it."
        ),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="32|64|128", help="int4 only: weights that share a scale; fewer are finer and larger."
        ),
    ] = None,
    output_bits: Annotated[
        int | None,
        typer.Option(
            metavar="8|4",
            help="Bits of the output layer, 8 by default. 4: answers come faster, the more so the larger the "
            "vocabulary, and some accuracy is lost.",
        ),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AUDIO",
            help="Clips or folders of speech that the original model transcribes first, to learn which weights matter; "
            "may be repeated. Needs memory for the original.",
        ),
    ] = None,
    *,
    screen: QuietOptions,
) -> None:
    """Write an int8, int4 or fp8 copy of a model, which loads at once and runs on a CPU or a GPU.

    The model goes through memory tensor by tensor. OUT is written whole or not at all.

    \b
    Examples:
      af3 quantize nvidia/audio-flamingo-3-hf af3-int4 --scheme int4
      af3 quantize ./checkpoint ./checkpoint-int8 --scheme int8
      af3 quantize ./checkpoint ./small --scheme int4 --calibrate clips/
    """
    from audioflamingo.quantize_folder import quantize_checkpoint

    prompts = None if calibrate is None else _prompts(model, calibrate)
    with Terminal.progress(total=1, is_shown=not screen.quiet) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done / total, f"{format_size(done)} of {format_size(total)}")

        quantize_checkpoint(
            model,
            folder,
            scheme.value,
            group_size=group_size,
            output_bits=output_bits,
            calibration=prompts,
            progress=show,
        )
    if not screen.quiet:
        size = sum(path.stat().st_size for path in folder.expanduser().glob("*.safetensors"))
        Terminal.say(f"{folder}: {format_size(size)} of weights, {scheme.value}")


def _prompts(model: str, names: list[str]) -> list[Any]:
    """A transcription prompt for each clip."""
    from audioflamingo.processor import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    return [processor.apply_transcription_request(audio=_source(clip)) for clip in find_inputs(names)]


def _source(clip: Input) -> Any:
    if clip.error is not None:
        raise clip.error
    return clip.source
