"""Runs shards through a pool of actors with Ray Data; a worker that dies is started again, and so is its shard."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from audioflamingo.corpus.cluster import EXTRA, WorkerPlan
from audioflamingo.errors import AudioFlamingoError, ClusterError, require

Load = Callable[[], tuple[Any, Any]]
Work = Callable[
    [Any, Any, dict[str, Any]], Sequence[str]
]  # a model, its processor, a shard's row -> its records, a line each


class AnyShard(Protocol):
    """Work that one worker does together, and that is done again if it dies meanwhile."""

    @property
    def index(self) -> int:
        """Its place among all shards."""

    def to_row(self) -> dict[str, Any]:
        """A row of a Ray data set, with the column `index`."""


S = TypeVar("S", bound=AnyShard)

MAX_ATTEMPTS = 3  # times that a shard may take its worker down with it
MAX_FAILED_SHARDS = 16  # more of them are no bad files or questions but a bad model or cluster


class AttemptCounter:
    """Counts how often each shard was begun. The cluster itself tries a shard again forever."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def count(self, index: int) -> int:
        """Counts one more attempt and returns how many there are now."""
        self._counts[index] += 1
        return self._counts[index]


class ShardWorker:
    """Turns the row of a shard into the row of its result.

    What goes wrong is part of the result, because the cluster would only say that a task has failed:
    `load_error` holds why there is no model, `failure` what broke the shard as a whole, each empty if all is
    well. A file that cannot be read breaks nothing: its record has its error.

    Args:
        load: gives a model and its processor.
        work: what is done with a shard.
        count_attempt: `AttemptCounter.count`, of one counter for all workers.
    """

    def __init__(self, load: Load, work: Work, count_attempt: Callable[[int], int]) -> None:
        self._work = work
        self._count_attempt = count_attempt
        self._load_error = ""
        try:
            self._model, self._processor = load()
        except Exception as error:
            self._load_error = describe_error(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Does a shard's work."""
        result = {"index": row["index"], "records": "", "failure": "", "load_error": self._load_error}
        if self._load_error:
            return result
        if self._count_attempt(row["index"]) > MAX_ATTEMPTS:
            return {
                **result,
                "failure": f"its worker died {MAX_ATTEMPTS} times: a crash, or not enough memory",
            }
        try:
            return {**result, "records": "".join(self._work(self._model, self._processor, row))}
        except Exception as error:
            return {**result, "failure": describe_error(error)}


def describe_error(error: Exception) -> str:
    """An error in a line: ours by its message, any other with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, AudioFlamingoError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class ShardResult(Generic[S]):
    """What became of a shard.

    Attributes:
        shard: which one.
        records: a line for each of its members; empty if the shard failed.
        failure: why it failed as a whole; empty if it did not.
    """

    shard: S
    records: tuple[str, ...]
    failure: str = ""


def check_failures(failed: Sequence[AnyShard], failure: str) -> None:
    """Raises `ClusterError` once so many shards have failed that it is no fault of theirs; the last one's is named."""
    if len(failed) > MAX_FAILED_SHARDS:
        raise ClusterError(
            f"{len(failed)} shards failed, the last one with: {failure}. What is finished is kept."
        )


def run_shards(shards: Sequence[S], load: Load, work: Work, plan: WorkerPlan) -> Iterator[ShardResult[S]]:
    """Has the work of shards done on the cluster that we are connected to.

    Args:
        shards: with indices of their own.
        load: gives a model and its processor; called once by each worker.
        work: what is done with each; pickled.
        plan: how many workers, and what each takes.

    Yields:
        One result for each shard, as they get done.

    Raises:
        ClusterError: the model cannot be loaded, or the cluster stopped.
    """
    missing = {shard.index: shard for shard in shards}
    with contextlib.closing(_rows(shards, load, work, plan)) as rows:
        for row in rows:
            if row["load_error"]:
                raise ClusterError(f"a worker cannot load the model: {row['load_error']}")
            shard = missing.pop(row["index"])
            yield ShardResult(shard, tuple(row["records"].splitlines(keepends=True)), row["failure"])
    if missing:
        raise ClusterError(f"the cluster lost {len(missing)} shards. The same command does them again.")


def _rows(
    shards: Sequence[AnyShard], load: Load, work: Work, plan: WorkerPlan
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
            fn_constructor_args=(load, work, lambda index: ray.get(attempts.count.remote(index))),
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
