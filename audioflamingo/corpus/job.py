"""Files in, one record for each out: what is done is kept, what fails alone is found alone."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audioflamingo.corpus.cluster import LOCAL, alive_nodes, connected, plan_workers
from audioflamingo.corpus.folder import CorpusFolder, describe_files
from audioflamingo.corpus.ray_data import ShardResult, run_shards
from audioflamingo.corpus.records import error_record
from audioflamingo.corpus.shards import CorpusFile, Shard, cut_shards
from audioflamingo.corpus.worker import Load
from audioflamingo.errors import ArgumentError, ClusterError
from audioflamingo.transcription.options import TranscriptionOptions

SHARD_SIZE = 16
MAX_FAILED_SHARDS = 16  # more of them are no bad files but a bad model or cluster

OnRecords = Callable[[Sequence[str]], None]


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


def transcribe_corpus(
    files: Sequence[CorpusFile],
    output_dir: str | os.PathLike[str],
    load: Load,
    *,
    model: dict[str, Any],
    options: TranscriptionOptions | None = None,
    address: str = LOCAL,
    shard_size: int = SHARD_SIZE,
    num_workers: int | None = None,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
    overwrite: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_records: OnRecords | None = None,
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
        address: see `connected`.
        shard_size: files that a worker transcribes together.
        num_workers, cpus_per_worker, gpus_per_worker: see `plan_workers`.
        overwrite: start again where `output_dir` holds another run.
        on_start: called with the number of files whose records are there already.
        on_records: called with the records of files that are done.

    Raises:
        ArgumentError: `output_dir` holds another run, a value is not allowed, or two files share a name.
        ClusterError: the cluster cannot be reached, or stopped; the same call goes on.
        OutputError: `output_dir` cannot be written to.
        MissingDependencyError: Ray is not installed.
    """
    _check(files, shard_size)
    options = options or TranscriptionOptions()
    run = {**_describe(model, options), "shard_size": shard_size, **describe_files(files)}
    folder = CorpusFolder(Path(output_dir).expanduser(), run, overwrite)
    shards = cut_shards(files, shard_size)
    todo = [shard for shard in shards if not folder.is_done(shard)]
    num_kept = len(files) - sum(len(shard.files) for shard in todo)
    if on_start is not None:
        on_start(num_kept)
    if todo:
        with connected(address):
            plan = plan_workers(alive_nodes(), num_workers, cpus_per_worker, gpus_per_worker)

            def run_all(parts: Sequence[Shard]) -> Iterator[ShardResult]:
                return run_shards(parts, load, options, plan)

            _run(todo, run_all, folder, on_records or (lambda records: None))
    return CorpusSummary(folder.path, len(files), folder.merge(shards), num_kept)


def _run(
    shards: Sequence[Shard],
    run_all: Callable[[Sequence[Shard]], Iterator[ShardResult]],
    folder: CorpusFolder,
    on_records: OnRecords,
) -> None:
    """Runs shards, then what failed file by file, so that only the files at fault are given up."""
    failed: list[Shard] = []
    for result in run_all(shards):
        if not result.failure:
            folder.write_part(result.shard, result.records)
            on_records(result.records)
            continue
        failed.append(result.shard)
        if len(failed) > MAX_FAILED_SHARDS:
            raise ClusterError(
                f"{len(failed)} shards failed, the last one with: {result.failure}. What is finished is kept."
            )
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


def _check(files: Sequence[CorpusFile], shard_size: int) -> None:
    if not files:
        raise ArgumentError("there is nothing to transcribe: no files.")
    if shard_size < 1:
        raise ArgumentError(f"shard_size must be at least 1, got {shard_size}.")
    if len({file.name for file in files}) < len(files):
        raise ArgumentError("two files of the corpus share a name: their records could not be told apart.")
