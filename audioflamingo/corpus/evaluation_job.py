"""An evaluation on a Ray cluster: shards of questions to workers, the answers and scores to one folder here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from audioflamingo.corpus.cluster import (
    EXTRA,
    ClusterOptions,
    WorkerPlan,
    alive_nodes,
    connected,
    plan_workers,
)
from audioflamingo.corpus.ray_data import Load, check_failures, describe_error, run_shards
from audioflamingo.errors import ClusterError, require

if TYPE_CHECKING:
    from audioflamingo.datasets.conversations import DataRow
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.evaluation.evaluate_dataset import Evaluation, ModelFacts
    from audioflamingo.evaluation.evaluation_options import EvaluationOptions
    from audioflamingo.evaluation.questions import Question
    from audioflamingo.evaluation.scoring import ItemResult
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
    from audioflamingo.processor.processor import AudioFlamingo3Processor


@dataclass(frozen=True)
class QuestionShard:
    """Questions that one worker answers together.

    Attributes:
        index: its place among all shards.
        questions: one or more.
    """

    index: int
    questions: tuple[Question, ...]

    def to_row(self) -> dict[str, Any]:
        """A row of a Ray data set; questions are pickled by value, their rules of scoring too."""
        pickled = require("ray.cloudpickle", EXTRA, "ray").dumps(self.questions)
        return {"index": self.index, "questions": pickled}


def evaluate_on_cluster(
    load: Load,
    dataset: str | os.PathLike[str] | DatasetConfig | Sequence[DataRow],
    *,
    cluster: ClusterOptions | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """`evaluation.evaluate` with the models of a Ray cluster, into the same folder: either goes on where one stopped.

    Time is that of the whole cluster, so `rtfx` is too. A question that takes its worker down with it again and again
    is an item with an error.

    Args:
        load: gives a model and its processor; pickled, and called by each worker.
        dataset: as for `evaluate`; every node reads its audio under the same paths.
        cluster: which one works, with what, and in which pieces.
        output_dir: as for `evaluate`. Only this machine writes there.
        progress: called with the number of questions that are done and of all.
        **options: as for `evaluate`.

    Raises:
        ClusterError: the cluster cannot be reached, or stopped, or cannot load the model; the same call goes on.
        DataError, ArgumentError, OutputError: as from `evaluate`.
        MissingDependencyError: Ray is not installed.
    """
    from audioflamingo.evaluation.evaluate_dataset import read_questions, run_questions, split_options

    settings, options = split_options(options)
    questions = read_questions(dataset, settings)
    cluster = cluster or ClusterOptions()
    with connected(cluster.address):
        plan = plan_workers(
            alive_nodes(), cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker
        )
        facts = _ask_for_facts(load, plan, options.get("adapter"))
        options = {**facts.decoding, **options}
        work = partial(answer_shard, settings, options)

        def answer(remaining: Sequence[Question]) -> Iterator[tuple[Question, ItemResult]]:
            return _answer(remaining, load, work, plan, cluster.shard_size)

        return run_questions(questions, settings, options, facts, answer, output_dir, progress)


def answer_shard(
    settings: EvaluationOptions,
    options: dict[str, Any],
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    row: dict[str, Any],
) -> list[str]:
    """The items of a shard's questions, a line each, as they stand in the run's folder."""
    import pickle

    from audioflamingo.evaluation.answering import answer_questions
    from audioflamingo.evaluation.run_folder import line_of

    questions = pickle.loads(row["questions"])  # of the command's own making
    answers = answer_questions(model, processor, questions, settings, **options)
    return [line_of(question.key, item) for question, item in answers]


def _ask_for_facts(load: Load, plan: WorkerPlan, adapter: str | None) -> ModelFacts:
    """What the model is, from a worker: this machine may have no room for it."""
    ray = require("ray", EXTRA)
    task = ray.remote(max_calls=1)(_facts).options(num_cpus=plan.cpus, num_gpus=plan.gpus)
    try:
        facts: ModelFacts | str = ray.get(task.remote(load, adapter))
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a worker died while it loaded the model: {describe_error(error)}") from error
    if isinstance(facts, str):
        raise ClusterError(f"a worker cannot load the model: {facts}")
    return facts


def _facts(load: Load, adapter: str | None) -> ModelFacts | str:
    from audioflamingo.evaluation.evaluate_dataset import describe_model

    try:
        return describe_model(*load(), adapter)
    except Exception as error:
        return describe_error(error)


def _answer(
    questions: Sequence[Question],
    load: Load,
    work: Callable[..., list[str]],
    plan: WorkerPlan,
    shard_size: int,
) -> Iterator[tuple[Question, ItemResult]]:
    """Questions and their items: in shards, then one by one those of shards that failed as a whole."""
    from audioflamingo.evaluation.answering import failed_item
    from audioflamingo.evaluation.run_folder import item_of

    ordered = sorted(questions, key=lambda question: -question.duration_s)
    starts = range(0, len(ordered), shard_size)
    shards = [QuestionShard(i, tuple(ordered[at : at + shard_size])) for i, at in enumerate(starts)]
    failed: list[QuestionShard] = []
    before = time.perf_counter()
    while shards:
        for result in run_shards(shards, load, work, plan):
            members, items = result.shard.questions, dict(map(item_of, result.records))
            if result.failure and len(members) == 1:
                items = {members[0].key: failed_item(members[0], ClusterError(result.failure))}
            elif result.failure:
                failed.append(result.shard)
                check_failures(failed, result.failure)
                continue
            elapsed_s = round((time.perf_counter() - before) / len(members), 4)
            before = time.perf_counter()
            for question in members:
                yield question, replace(items[question.key], elapsed_s=elapsed_s)
        alone = [question for shard in failed for question in shard.questions]
        shards, failed = [QuestionShard(i, (question,)) for i, question in enumerate(alone)], []
