"""Files in, one record for each out: what is done is kept, what fails alone is found alone."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from audioflamingo.corpus.cluster import ClusterOptions, alive_nodes, connected, plan_workers
from audioflamingo.corpus.folder import CorpusFolder, describe_files
from audioflamingo.corpus.ray_data import Load, ShardResult, check_failures, run_shards
from audioflamingo.corpus.records import CorpusFile, Shard, cut_shards, error_record, transcribe_shard
from audioflamingo.errors import ArgumentError
from audioflamingo.transcription.transcription_options import TranscriptionOptions


@dataclass(frozen=True)
class CorpusSummary:
    """What a run has done.

    Attributes:
        path: the file with all records.
        num_files: records in it.
        num_failed: of those, records of an error.
        num_kept: records that were there before.
    """

    path: Path
    num_files: int
    num_failed: int
    num_kept: int


class CorpusWatcher:
    """Hears how a job goes. This one does nothing about it."""

    def started(self, num_kept: int) -> None:
        """The job begins; the records of so many files are there already."""

    def finished(self, records: Sequence[str]) -> None:
        """Files are done."""


def transcribe_corpus(
    files: Sequence[CorpusFile],
    output_dir: str | os.PathLike[str],
    load: Load,
    *,
    model: dict[str, Any],
    options: TranscriptionOptions | None = None,
    cluster: ClusterOptions | None = None,
    overwrite: bool = False,
    watcher: CorpusWatcher | None = None,
) -> CorpusSummary:
    """Transcribes files on a Ray cluster into one file of records, in their order.

    A run that was stopped goes on in the same folder. A file that cannot be read, or that takes its worker down
    with it, has its error for a record, and the others go on.

    Args:
        files: with distinct names.
        output_dir: see `audioflamingo.corpus.folder` for what stands in it. Only this machine writes there.
        load: gives a model and its processor; pickled, and called once by each worker.
        model: JSON that tells models apart; a folder with results of another one is refused.
        options: how files are transcribed; another `batch_size` may be used to go on.
        cluster: which one works, with what, and in which pieces.
        overwrite: start again where `output_dir` holds another run.
        watcher: hears how it goes.

    Raises:
        ArgumentError: `output_dir` holds another run, a value is not allowed, or two files share a name.
        ClusterError: the cluster cannot be reached, or stopped; the same call goes on.
        OutputError: `output_dir` cannot be written to.
        MissingDependencyError: Ray is not installed.
    """
    _check(files)
    options, cluster = options or TranscriptionOptions(), cluster or ClusterOptions()
    watcher = watcher or CorpusWatcher()
    run = {**_describe(model, options), "shard_size": cluster.shard_size, **describe_files(files)}
    folder = CorpusFolder(Path(output_dir).expanduser(), run, overwrite)
    shards = cut_shards(files, cluster.shard_size)
    todo = [shard for shard in shards if not folder.is_done(shard)]
    num_kept = len(files) - sum(len(shard.files) for shard in todo)
    watcher.started(num_kept)
    if todo:
        with connected(cluster.address):
            plan = plan_workers(
                alive_nodes(), cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker
            )

            def run_all(parts: Sequence[Shard]) -> Iterator[ShardResult[Shard]]:
                return run_shards(parts, load, partial(transcribe_shard, options), plan)

            _run(todo, run_all, folder, watcher.finished)
    return CorpusSummary(folder.path, len(files), folder.merge(shards), num_kept)


def _run(
    shards: Sequence[Shard],
    run_all: Callable[[Sequence[Shard]], Iterator[ShardResult[Shard]]],
    folder: CorpusFolder,
    on_records: Callable[[Sequence[str]], None],
) -> None:
    """Runs shards, then what failed file by file, so that only the files at fault are given up."""
    failed: list[Shard] = []
    for result in run_all(shards):
        if not result.failure:
            folder.write_part(result.shard, result.records)
            on_records(result.records)
            continue
        failed.append(result.shard)
        check_failures(failed, result.failure)
    alone = [(shard, file) for shard in failed for file in shard.files]
    records: dict[int, dict[str, str]] = defaultdict(dict)
    singles = [Shard(number, (file,)) for number, (_, file) in enumerate(alone)]
    for result in run_all(singles) if singles else ():
        shard, file = alone[result.shard.index]
        record = error_record(file.name, result.failure) if result.failure else result.records[0]
        done = records[shard.index]
        done[file.name] = record
        on_records([record])
        if len(done) == len(shard.files):
            folder.write_part(shard, [done[file.name] for file in shard.files])


def _describe(model: dict[str, Any], options: TranscriptionOptions) -> dict[str, Any]:
    """What decides about the text of a transcript; the size of a batch does not."""
    values = dataclasses.asdict(options)
    del values["batch_size"]
    return {**model, **values.pop("vad"), **values}


def _check(files: Sequence[CorpusFile]) -> None:
    if not files:
        raise ArgumentError("there is nothing to transcribe: no files.")
    if len({file.name for file in files}) < len(files):
        raise ArgumentError("two files of the corpus share a name: their records could not be told apart.")
