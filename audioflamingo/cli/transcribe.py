"""`af3 transcribe`: files, folders, patterns, URLs and standard input to transcripts."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from audioflamingo.cli.corpus_jobs import (
    AddressOption,
    CorpusJob,
    CpusPerWorkerOption,
    Engine,
    EngineOption,
    GpusPerWorkerOption,
    NumWorkersOption,
    ShardSizeOption,
    check_ray_output,
    corpus_files,
    refuse_ray_options,
)
from audioflamingo.cli.options import (
    DEFAULT_MODEL,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    QuantizationOption,
    QuietOption,
    VerboseOption,
)
from audioflamingo.corpus.cluster import LOCAL
from audioflamingo.corpus.job import SHARD_SIZE
from audioflamingo.transcription.options import TranscriptionOptions, VadOptions


class FormatName(StrEnum):
    """Format of a transcript."""

    TXT = "txt"
    JSON = "json"
    JSONL = "jsonl"
    SRT = "srt"
    VTT = "vtt"
    TSV = "tsv"


_SPEECH = "Finding speech"


def transcribe(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files, folders (with all below them), quoted patterns such as 'calls/**/*.wav', URLs, lists of files "
            "(.jsonl, see below), or - for standard input.",
            show_default=False,
        ),
    ],
    output_format: Annotated[
        FormatName,
        typer.Option("--format", "-f", help="Format of the transcripts.", rich_help_panel="Output"),
    ] = FormatName.TXT,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Write one file for each audio here, in place of printing.",
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Transcribe again what has its output already.", rich_help_panel="Output"
        ),
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    quantization: QuantizationOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows that run together.", rich_help_panel="Model")
    ] = TranscriptionOptions.batch_size,
    prompt: Annotated[
        str | None,
        typer.Option(
            help='Instruction; by default the checkpoint\'s ("Transcribe the input speech.").',
            rich_help_panel="Model",
        ),
    ] = TranscriptionOptions.prompt,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens for one segment.", rich_help_panel="Model")
    ] = TranscriptionOptions.max_new_tokens,
    num_beams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Beams of beam search: hears better, takes longer; 1 is greedy. By default the checkpoint's: "
            "4 for nano, 1 for Audio Flamingo 3.",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = TranscriptionOptions.num_beams,
    use_vad: Annotated[
        bool,
        typer.Option(
            "--use-vad/--no-vad", help="Only what is speech; --no-vad: everything.", rich_help_panel=_SPEECH
        ),
    ] = TranscriptionOptions.use_vad,
    threshold: Annotated[
        float, typer.Option(help="Speech starts at this probability.", rich_help_panel=_SPEECH)
    ] = VadOptions.threshold,
    min_silence_ms: Annotated[
        float, typer.Option(help="A pause this long ends a segment.", rich_help_panel=_SPEECH)
    ] = VadOptions.min_silence_ms,
    max_window_s: Annotated[
        float, typer.Option(help="Longest segment, at most 30.", rich_help_panel=_SPEECH)
    ] = VadOptions.max_window_s,
    engine: EngineOption = Engine.LOCAL,
    address: AddressOption = LOCAL,
    num_workers: NumWorkersOption = None,
    cpus_per_worker: CpusPerWorkerOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
    shard_size: ShardSizeOption = SHARD_SIZE,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Transcribe speech of any length.

    Text is printed as it comes. With --output-dir one file is written for each audio, whole or not at all.

    After an interruption the same command goes on where it was. A file that cannot be read is reported, the
    others go on, and the exit code is 1.

    A list of files holds one JSON object a line, {"path": "a.wav"} or {"audio_filepath": "a.wav"}, relative to
    its own folder.

    \b
    Examples:
      af3 transcribe meeting.mp3
      af3 transcribe recordings/ -f srt -o subtitles/
      af3 transcribe 'calls/2024-*/*.wav' -f jsonl -o calls-json/ --batch-size 16
      ffmpeg -i film.mkv -f wav - | af3 transcribe - -f vtt > film.vtt
      af3 transcribe corpus.jsonl -o corpus-out/ --engine ray --address 10.0.0.1:6379
    """
    from audioflamingo.cli.inputs import find_inputs
    from audioflamingo.cli.jobs import TranscriptionJob

    vad_threshold = {"threshold": threshold, "end_threshold": min(VadOptions.end_threshold, threshold)}
    vad = VadOptions(**vad_threshold, min_silence_ms=min_silence_ms, max_window_s=max_window_s)
    options = dataclasses.replace(
        TranscriptionOptions(),
        batch_size=batch_size,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        use_vad=use_vad,
        vad=vad,
    )
    inputs = find_inputs(paths)
    if engine is Engine.RAY:
        folder = check_ray_output(ctx, output_format.value, output_dir)
        if device == "cpu" and gpus_per_worker is None:
            gpus_per_worker = 0.0
        CorpusJob(corpus_files(inputs), folder, quiet, verbose).run(
            model,
            device,
            dtype,
            quantization,
            options,
            address=address,
            shard_size=shard_size,
            num_workers=num_workers,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            overwrite=overwrite,
        )
        return
    refuse_ray_options(ctx)
    if output_dir is None and len(inputs) > 1 and output_format not in (FormatName.TXT, FormatName.JSONL):
        raise typer.BadParameter(
            f"{len(inputs)} transcripts as {output_format.value} cannot share one output; add --output-dir, "
            "or use --format txt or jsonl.",
            param_hint="--format",
        )
    job = TranscriptionJob(ctx, inputs, output_format.value, output_dir, overwrite, options, quiet, verbose)
    job.run(model, device, dtype, quantization)
