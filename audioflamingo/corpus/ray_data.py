"""Runs shards through a pool of actors with Ray Data; a worker that dies is started again, and so is its shard."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from audioflamingo.corpus.cluster import EXTRA, WorkerPlan
from audioflamingo.corpus.shards import Shard
from audioflamingo.corpus.worker import AttemptCounter, Load, ShardWorker
from audioflamingo.errors import ClusterError, require
from audioflamingo.transcription.options import TranscriptionOptions


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard.

    Attributes:
        shard: which one.
        records: a line for each of its files; empty if the shard failed.
        failure: why it failed as a whole; empty if it did not.
    """

    shard: Shard
    records: tuple[str, ...]
    failure: str = ""


def run_shards(
    shards: Sequence[Shard], load: Load, options: TranscriptionOptions, plan: WorkerPlan
) -> Iterator[ShardResult]:
    """Transcribes shards on the cluster that we are connected to.

    Args:
        shards: with indices of their own.
        load: gives a model and its processor; called once by each worker.
        options: how files are transcribed.
        plan: how many workers, and what each takes.

    Yields:
        One result for each shard, as they get done.

    Raises:
        ClusterError: the model cannot be loaded, or the cluster stopped.
    """
    missing = {shard.index: shard for shard in shards}
    with contextlib.closing(_rows(shards, load, options, plan)) as rows:
        for row in rows:
            if row["load_error"]:
                raise ClusterError(f"a worker cannot load the model: {row['load_error']}")
            shard = missing.pop(row["index"])
            yield ShardResult(shard, tuple(row["records"].splitlines(keepends=True)), row["failure"])
    if missing:
        raise ClusterError(f"the cluster lost {len(missing)} shards. The same command does them again.")


def _rows(
    shards: Sequence[Shard], load: Load, options: TranscriptionOptions, plan: WorkerPlan
) -> Generator[dict[str, Any], None, None]:
    """What the workers return."""
    ray, data = require("ray", EXTRA), require("ray.data", EXTRA)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a shard of long recordings takes its time
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(AttemptCounter).remote()
    with data.DataContext.current(context):
        results = data.from_items(
            [shard.to_row() for shard in shards],
            override_num_blocks=len(shards),  # a block is what a worker takes, and gives back, at a time
        ).map(
            ShardWorker,
            fn_constructor_args=(load, options, lambda index: ray.get(attempts.count.remote(index))),
            compute=data.ActorPoolStrategy(
                size=min(plan.num_workers, len(shards)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
        )
        # Without fetching ahead: its thread would outlive the loop, and break when we part from the cluster.
        tables = iter(results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        try:
            for table in tables:
                yield from table.to_pylist()
        except ray.exceptions.RayError as error:
            text = " ".join(str(error).split())[:500]
            raise ClusterError(
                f"the job stopped on the cluster: {text}. What is finished is kept; the same command goes on."
            ) from error
        finally:
            tables.close()
