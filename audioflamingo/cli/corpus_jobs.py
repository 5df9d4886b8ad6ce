"""`af3 transcribe --engine ray`: its options, and what is shown of a job on a cluster."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from audioflamingo.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED
from audioflamingo.cli.inputs import STDIN, Input
from audioflamingo.cli.loading import load
from audioflamingo.cli.options import Dtype, Quantization
from audioflamingo.cli.terminal import ProgressBar, Terminal
from audioflamingo.corpus import CorpusFile, CorpusSummary, transcribe_corpus
from audioflamingo.transcription.options import TranscriptionOptions


class Engine(StrEnum):
    """Where the work is done."""

    LOCAL = "local"
    RAY = "ray"


_PANEL = "Ray"
EngineOption = Annotated[
    Engine,
    typer.Option(
        help="local: this process. ray: the workers of a Ray cluster; one record a file, in "
        "OUTPUT_DIR/transcripts.jsonl.",
        rich_help_panel=_PANEL,
    ),
]
AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_ADDRESS",
        metavar="HOST:PORT|auto|local",
        help="Head of the cluster; auto: the one that runs on this machine; local: start one here for this command.",
        rich_help_panel=_PANEL,
    ),
]
NumWorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Workers, each with a model; by default one for each GPU, without GPUs one for each node.",
        rich_help_panel=_PANEL,
    ),
]
CpusPerWorkerOption = Annotated[
    float | None,
    typer.Option(
        min=0.1, help="By default 1 beside a GPU, otherwise all of its node.", rich_help_panel=_PANEL
    ),
]
GpusPerWorkerOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="By default 1 if the cluster has GPUs.", rich_help_panel=_PANEL),
]
ShardSizeOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Files that a worker transcribes together, and that are done again if it dies meanwhile.",
        rich_help_panel=_PANEL,
    ),
]
_RAY_OPTIONS = ("address", "num_workers", "cpus_per_worker", "gpus_per_worker", "shard_size")


def refuse_ray_options(ctx: typer.Context) -> None:
    """Options of the cluster without one are a mistake.

    Raises:
        typer.BadParameter: one was given.
    """
    for name in _RAY_OPTIONS:
        if _source(ctx, name) == "COMMANDLINE":
            raise typer.BadParameter("it needs --engine ray.", param_hint=f"--{name.replace('_', '-')}")


def _source(ctx: typer.Context, name: str) -> str:
    """Where an option's value is from; by name, as typer may or may not bring its own click."""
    source = ctx.get_parameter_source(name)
    return "" if source is None else source.name


def check_ray_output(ctx: typer.Context, format_name: str, output_dir: Path | None) -> Path:
    """The folder for the records.

    Raises:
        typer.BadParameter: there is none, or another format is asked for.
    """
    if _source(ctx, "output_format") == "COMMANDLINE" and format_name != "jsonl":
        raise typer.BadParameter("--engine ray writes jsonl.", param_hint="--format")
    if output_dir is None:
        raise typer.BadParameter("--engine ray needs a folder for its records.", param_hint="--output-dir")
    return output_dir


def corpus_files(inputs: Sequence[Input]) -> list[CorpusFile]:
    """What the workers are to open.

    Raises:
        AudioError: an argument names no audio at all.
        typer.BadParameter: standard input is among it.
    """
    for item in inputs:
        if item.error is not None:
            raise item.error
        if item.name == STDIN:
            raise typer.BadParameter(
                "the workers cannot read this command's standard input.", param_hint="PATH"
            )
    return [
        CorpusFile(item.name, item.name if item.path is None else os.path.abspath(item.path))
        for item in inputs
    ]


class CorpusJob:
    """Shows a run of `transcribe_corpus`.

    Args:
        files: what is transcribed.
        output_dir: where the records go.
        quiet: show errors only.
        verbose: say what is begun.
    """

    def __init__(self, files: Sequence[CorpusFile], output_dir: Path, quiet: bool, verbose: bool) -> None:
        self._files = files
        self._output_dir = output_dir
        self._quiet = quiet
        self._verbose = verbose
        self._num_done = 0
        self._bar = ProgressBar(None, None)

    def run(
        self,
        model: str,
        device: str,
        dtype: Dtype,
        quantization: Quantization | None,
        options: TranscriptionOptions,
        **settings: Any,
    ) -> None:
        """Transcribes what is left to do.

        Args:
            model, device, dtype, quantization: see `load`.
            options: how files are transcribed.
            **settings: of the cluster; see `transcribe_corpus`.

        Raises:
            typer.Exit: something failed, or Ctrl-C.
        """
        with Terminal.progress(len(self._files), not self._quiet) as bar:
            self._bar = bar
            try:
                summary = transcribe_corpus(
                    self._files,
                    self._output_dir,
                    functools.partial(load, _everywhere(model), device, dtype, False, quantization),
                    model=_describe(model, dtype, quantization),
                    options=options,
                    on_start=self._start,
                    on_records=self._take,
                    **settings,
                )
            except KeyboardInterrupt:
                counts = f"{self._num_done} of {len(self._files)} done"
                Terminal.say(f"interrupted: {counts}. The same command goes on with the rest.")
                raise typer.Exit(EXIT_INTERRUPTED) from None
        self._finish(summary)

    def _start(self, num_kept: int) -> None:
        self._num_done = num_kept
        if num_kept and not self._quiet:
            Terminal.say(f"{num_kept} already transcribed; --overwrite does them again.")
        if self._verbose:
            Terminal.say(f"{len(self._files) - num_kept} files to transcribe.")

    def _take(self, records: Sequence[str]) -> None:
        self._num_done += len(records)
        for record in map(json.loads, records):
            name, error = record["source"], record["error"]
            if error is not None:
                Terminal.say(f"error: {error}" if name in error else f"error: {name}: {error}")
        self._bar.update(self._num_done, f"{self._num_done}/{len(self._files)}")

    def _finish(self, summary: CorpusSummary) -> None:
        if not self._quiet:
            failed = f", {summary.num_failed} failed" if summary.num_failed else ""
            Terminal.say(f"{summary.num_files - summary.num_failed} transcribed{failed} -> {summary.path}")
        if summary.num_failed:
            raise typer.Exit(EXIT_FAILED)


def _everywhere(model: str) -> str:
    """A folder by its whole path: workers run elsewhere."""
    return os.path.abspath(os.path.expanduser(model)) if os.path.isdir(os.path.expanduser(model)) else model


def _describe(model: str, dtype: Dtype, quantization: Quantization | None) -> dict[str, Any]:
    """What tells the model from others, whatever its folder is called."""
    from audioflamingo.corpus.identity import fingerprint_checkpoint
    from audioflamingo.hub import resolve_folder

    return {
        "model_sha256": fingerprint_checkpoint(resolve_folder(model)),
        "dtype": dtype.value,
        "quantization": None if quantization is None else quantization.value,
    }
