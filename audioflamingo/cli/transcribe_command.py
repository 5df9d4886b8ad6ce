"""`af3 transcribe`: files, folders, patterns, URLs and standard input to transcripts."""

from __future__ import annotations

from typing import Annotated

import typer

from audioflamingo.cli.cluster_job import ClusterJob, Engine, check_cluster_output, corpus_files
from audioflamingo.cli.flags import ScreenOptions, is_given, refuse_without, with_flags
from audioflamingo.cli.inputs import find_inputs
from audioflamingo.cli.model_loading import AdaptedModelOptions
from audioflamingo.cli.transcribe_job import OutputOptions, TranscribeJob
from audioflamingo.corpus import ClusterOptions
from audioflamingo.transcription.transcription_options import TranscriptionOptions


@with_flags
def transcribe(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Files, folders (with all below them), quoted patterns such as 'calls/**/*.wav', URLs, lists of files "
            "(.jsonl, .json, .csv, .tsv, see above), or - for standard input.",
            show_default=False,
        ),
    ],
    *,
    output: OutputOptions,
    model: AdaptedModelOptions,
    options: TranscriptionOptions,
    engine: Annotated[
        Engine,
        typer.Option(
            help="local: this process. ray: the workers of a Ray cluster; one record a file, in "
            "OUTPUT_DIR/transcripts.jsonl.",
            rich_help_panel="Ray",
        ),
    ] = Engine.LOCAL,
    cluster: ClusterOptions,
    screen: ScreenOptions,
) -> None:
    """Transcribe speech of any length.

    Text is printed as it comes. With --output-dir one file is written for each audio, whole or not at all.

    After an interruption the same command goes on where it was. A file that cannot be read is reported, the
    others go on, and the exit code is 1.

    A list of files (.jsonl, .json, .csv, .tsv) holds one row a file, {"path": "a.wav"} or {"audio_filepath": "a.wav"},
    relative to its own folder. A row with offset and duration in seconds, as NeMo's lists have, is about that part of
    its file, with times from its start.

    \b
    Examples:
      af3 transcribe meeting.mp3
      af3 transcribe recordings/ -f srt -f json -o subtitles/
      af3 transcribe lecture.mp4 --start 1:30 --end 5:00
      af3 transcribe 'calls/2024-*/*.wav' -f jsonl -o calls-json/ --batch-size 16
      ffmpeg -i film.mkv -f wav - | af3 transcribe - -f vtt > film.vtt
      af3 transcribe corpus.jsonl -o corpus-out/ --engine ray --address 10.0.0.1:6379
    """
    inputs = find_inputs(paths)
    if engine is Engine.RAY:
        folder = check_cluster_output(output, is_given(ctx, "formats"))
        ClusterJob(corpus_files(inputs), folder, screen).run(model, options, cluster, output.overwrite)
        return
    refuse_without(ctx, ClusterOptions, "--engine ray")
    if output.output_dir is None and len(output.formats) > 1:
        raise typer.BadParameter("several formats need --output-dir.", param_hint="--format")
    is_whole = output.formats[0] not in ("txt", "jsonl")
    if output.output_dir is None and len(inputs) > 1 and is_whole:
        raise typer.BadParameter(
            f"{len(inputs)} transcripts as {output.formats[0]} cannot share one output; add --output-dir, "
            "or use --format txt or jsonl.",
            param_hint="--format",
        )
    TranscribeJob(ctx, inputs, output, options, screen).run(model)
