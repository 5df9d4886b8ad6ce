"""The work of `--engine ray`: what is sent to the cluster, and what is shown of a corpus on it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from audioflamingo.cli.failures import EXIT_FAILED, EXIT_INTERRUPTED
from audioflamingo.cli.flags import ScreenOptions
from audioflamingo.cli.inputs import STDIN, Input
from audioflamingo.cli.model_loading import ADAPTER_NAME, AdaptedModelOptions, load_with_adapter
from audioflamingo.cli.terminal import ProgressBar, Terminal
from audioflamingo.cli.transcribe_job import OutputOptions
from audioflamingo.corpus import (
    ClusterOptions,
    CorpusFile,
    CorpusSummary,
    CorpusWatcher,
    transcribe_corpus,
)
from audioflamingo.errors import AudioError
from audioflamingo.fields import option
from audioflamingo.transcription.transcription_options import TranscriptionOptions


class Engine(StrEnum):
    """Where the work is done."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class PlacedModelOptions(AdaptedModelOptions):
    """A model, an adapter of it, and who computes."""

    engine: Engine = option(
        Engine.LOCAL, "local: this process. ray: the workers of a Ray cluster.", group="Ray"
    )
    cluster: ClusterOptions = field(default_factory=ClusterOptions)


def check_cluster_output(output: OutputOptions, is_format_given: bool) -> Path:
    """The folder for the records.

    Raises:
        typer.BadParameter: there is none, or another format is asked for.
    """
    if is_format_given and output.formats != ("jsonl",):
        raise typer.BadParameter("--engine ray writes jsonl.", param_hint="--format")
    if output.output_dir is None:
        raise typer.BadParameter("--engine ray needs a folder for its records.", param_hint="--output-dir")
    return output.output_dir


def corpus_files(inputs: Sequence[Input]) -> list[CorpusFile]:
    """What the workers are to open.

    Raises:
        AudioError: an argument names no audio at all.
        typer.BadParameter: standard input is among it.
    """
    for item in inputs:
        if item.error is not None:
            raise item.error
        if item.stretch is not None:
            raise AudioError(
                f"{item.name}: the workers hear files whole; leave offset and duration out of the list."
            )
        if item.name == STDIN:
            raise typer.BadParameter(
                "the workers cannot read this command's standard input.", param_hint="PATH"
            )
    return [
        CorpusFile(item.name, item.name if item.path is None else os.path.abspath(item.path))
        for item in inputs
    ]


class ClusterJob(CorpusWatcher):
    """Shows a run of `transcribe_corpus`.

    Args:
        files: what is transcribed.
        output_dir: where the records go.
        screen: what is shown.
    """

    def __init__(self, files: Sequence[CorpusFile], output_dir: Path, screen: ScreenOptions) -> None:
        self._files = files
        self._output_dir = output_dir
        self._screen = screen
        self._num_done = 0
        self._bar = ProgressBar(None, None)

    def run(
        self,
        model: AdaptedModelOptions,
        options: TranscriptionOptions,
        cluster: ClusterOptions,
        is_overwriting: bool,
    ) -> None:
        """Transcribes what is left to do.

        Args:
            model: what the workers load.
            options: how files are transcribed.
            cluster: who does it.
            is_overwriting: start again.

        Raises:
            typer.Exit: something failed, or Ctrl-C.
        """
        cluster = for_device(cluster, model)
        if model.adapter is not None:
            options = dataclasses.replace(options, adapter=ADAPTER_NAME)
        with Terminal.progress(len(self._files), not self._screen.quiet) as bar:
            self._bar = bar
            try:
                summary = transcribe_corpus(
                    self._files,
                    self._output_dir,
                    cluster_load(model),
                    model=_describe(model),
                    options=options,
                    cluster=cluster,
                    overwrite=is_overwriting,
                    watcher=self,
                )
            except KeyboardInterrupt:
                counts = f"{self._num_done} of {len(self._files)} done"
                Terminal.say(f"interrupted: {counts}. The same command goes on with the rest.")
                raise typer.Exit(EXIT_INTERRUPTED) from None
        self._finish(summary)

    def started(self, num_kept: int) -> None:
        """Says what is there already."""
        self._num_done = num_kept
        if num_kept and not self._screen.quiet:
            Terminal.say(f"{num_kept} already transcribed; --overwrite does them again.")
        if self._screen.verbose:
            Terminal.say(f"{len(self._files) - num_kept} files to transcribe.")

    def finished(self, records: Sequence[str]) -> None:
        """Moves the bar; says what failed."""
        self._num_done += len(records)
        for record in map(json.loads, records):
            name, error = record["source"], record["error"]
            if error is not None:
                Terminal.say(f"error: {error}" if name in error else f"error: {name}: {error}")
        self._bar.update(self._num_done, f"{self._num_done}/{len(self._files)}")

    def _finish(self, summary: CorpusSummary) -> None:
        if not self._screen.quiet:
            failed = f", {summary.num_failed} failed" if summary.num_failed else ""
            Terminal.say(f"{summary.num_files - summary.num_failed} transcribed{failed} -> {summary.path}")
        if summary.num_failed:
            raise typer.Exit(EXIT_FAILED)


def for_device(cluster: ClusterOptions, model: AdaptedModelOptions) -> ClusterOptions:
    """Workers without GPUs for a model on the CPU."""
    if model.device == "cpu" and cluster.gpus_per_worker is None:
        return dataclasses.replace(cluster, gpus_per_worker=0.0)
    return cluster


def cluster_load(model: AdaptedModelOptions) -> Callable[[], tuple[Any, Any]]:
    """How a worker gets its model and processor."""
    return functools.partial(_load, _everywhere(model))


def _everywhere(options: AdaptedModelOptions) -> AdaptedModelOptions:
    """Folders by their whole paths: workers run elsewhere."""
    adapter = None if options.adapter is None else _whole_path(options.adapter)
    return dataclasses.replace(options, model=_whole_path(options.model), adapter=adapter)


def _whole_path(name: str) -> str:
    """A folder by its whole path, anything else as it is."""
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if os.path.isdir(folder) else name


def _load(model: AdaptedModelOptions) -> tuple[Any, Any]:
    """What a worker does first."""
    return load_with_adapter(model)[:2]


def _describe(options: AdaptedModelOptions) -> dict[str, Any]:
    """What tells the model from others, whatever its folder is called."""
    from audioflamingo.corpus.folder import fingerprint_checkpoint
    from audioflamingo.hub import ADAPTER_PATTERNS, resolve_folder

    extra = {}
    if options.adapter is not None:
        folder = resolve_folder(options.adapter, allow_patterns=ADAPTER_PATTERNS)
        extra["adapter_sha256"] = fingerprint_checkpoint(folder, ADAPTER_PATTERNS)
    return {
        **extra,
        "model_sha256": fingerprint_checkpoint(resolve_folder(options.model)),
        "dtype": options.dtype.value,
        "quantization": None if options.quantization is None else options.quantization.value,
    }
