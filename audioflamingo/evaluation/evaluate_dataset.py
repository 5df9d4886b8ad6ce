"""Answers the questions of a benchmark or data set and scores the answers; can be stopped and goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from audioflamingo.audio.stored import path_of
from audioflamingo.datasets.conversations import DataRow, read_dataset, text_of
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ArgumentError, DataError
from audioflamingo.evaluation.answering import answer_questions
from audioflamingo.evaluation.confusion_plot import plot_confusion
from audioflamingo.evaluation.evaluation_options import EvaluationOptions, Normalizer
from audioflamingo.evaluation.questions import Question, fingerprint_questions
from audioflamingo.evaluation.report import write_report
from audioflamingo.evaluation.run_folder import SUMMARY_FILE, RunFolder
from audioflamingo.evaluation.scoring import (
    BOOTSTRAP_SEED,
    ItemResult,
    Summary,
    normalize,
    options_of,
    score,
    scoring_of,
    summarize,
)
from audioflamingo.evaluation.speech import normalize_english
from audioflamingo.evaluation.submission import write_submission
from audioflamingo.evaluation.suite_questions import read_suite
from audioflamingo.evaluation.suites import SUITES
from audioflamingo.files import FileWatch, to_json, write_whole
from audioflamingo.kernels.host import to_host
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor

CONFUSION_FILE = "confusion.png"
PACKAGES = ("audioflamingo", "torch", "numpy")


Answers = Iterator[tuple[Question, ItemResult]]


@dataclass(frozen=True)
class ModelFacts:
    """What a run's folder says of the model.

    Attributes:
        digests: tell models, adapters and templates apart.
        decoding: keywords of `generate` that are named, so that they tell runs apart.
    """

    digests: dict[str, Any]
    decoding: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        summary: over all items.
        groups: what the data say (task, difficulty, ...), to value, to scores over its items.
        items: in the order of the data.
    """

    summary: Summary
    groups: dict[str, dict[str, Summary]]
    items: list[ItemResult]

    def to_dict(self) -> dict[str, Any]:
        """The scores, for JSON."""
        groups = {
            name: {value: part.to_dict() for value, part in parts.items()}
            for name, parts in self.groups.items()
        }
        unparsed = [item.id for item in self.items if item.is_unparsed and item.error is None]
        failed = {item.id: item.error for item in self.items if item.error is not None}
        return {"all": self.summary.to_dict(), "groups": groups, "unparsed": unparsed, "failed": failed}


def evaluate(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    dataset: str | os.PathLike[str] | DatasetConfig | Sequence[DataRow],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Asks a model the questions of a benchmark, or every row's last question, and scores the answers.

    Of conversations, answers in a transcription frame are scored by word error rate, questions with options
    `(A) ... (B) ...` by the option chosen, by letter or by text, and all others by exact match; see `scoring`. What a
    benchmark's rule is stands in `rules` and `suites`.

    Args:
        model: what is evaluated.
        processor: of the model.
        dataset: a file, folder or hub id of a benchmark with `suite`; else a file of conversations, or rows.
        output_dir: for the items, as answers come, the scores, a report; see `run_folder`. A run that was stopped goes
            on there.
        progress: called with the number of questions that are done and of all, after each.
        **options: fields of `EvaluationOptions`, and further keywords of `generate`, such as `adapter`.

    Raises:
        DataError: the data set cannot be used, or an audio file changes meanwhile.
        ArgumentError: `output_dir` holds the items of another model, data set or setting; or an unknown keyword.
        OutputError: `output_dir` cannot be written to.
    """
    settings, options = split_options(options)
    facts = describe_model(model, processor, options.get("adapter"))
    options = {**facts.decoding, **options}

    def answer(questions: Sequence[Question]) -> Answers:
        return answer_questions(model, processor, questions, settings, **options)

    return run_questions(
        read_questions(dataset, settings), settings, options, facts, answer, output_dir, progress
    )


def split_options(options: dict[str, Any]) -> tuple[EvaluationOptions, dict[str, Any]]:
    """The fields of `EvaluationOptions` among keywords, and the others."""
    names = {field.name for field in dataclasses.fields(EvaluationOptions)}
    settings = EvaluationOptions(**{name: value for name, value in options.items() if name in names})
    return settings, {name: value for name, value in options.items() if name not in names}


def run_questions(
    questions: Sequence[Question],
    settings: EvaluationOptions,
    options: dict[str, Any],
    facts: ModelFacts,
    answer: Callable[[Sequence[Question]], Answers],
    output_dir: str | os.PathLike[str] | None,
    progress: Callable[[int, int], None] | None,
) -> Evaluation:
    """Has questions answered, those that are not yet, and collects scores; see `evaluate`.

    Args:
        questions: all of them.
        settings: of the evaluation.
        options: keywords of `generate`.
        facts: about the model that is asked.
        answer: answers and scores questions, in any order.
        output_dir: the run's folder.
        progress: called with the number of questions that are done and of all, after each.
    """
    watch = FileWatch(path_of(clip) for question in questions for clip in question.clips())
    manifest = make_manifest(questions, settings, options, facts.digests)
    done: dict[str, ItemResult] = {}
    folder = None if output_dir is None else Path(output_dir).expanduser()
    with nullcontext() if folder is None else RunFolder(folder, manifest, settings.overwrite) as run:
        if run is not None:
            done = dict(run.done)
            check_audio(run.folder, questions, done, watch)
        remaining = [question for question in questions if question.key not in done]
        for question, item in answer(remaining) if remaining else ():
            paths = [path_of(clip) for clip in question.clips()]
            watch.check(paths)
            item = done[question.key] = dataclasses.replace(item, audio=tuple(map(watch.fingerprint, paths)))
            if run is not None:
                run.add(question.key, item)
            if progress is not None:
                progress(len(done), len(questions))
        result = collect(questions, done)
        if folder is not None:
            write_results(folder, questions, result, manifest, settings)
    return result


def check_audio(
    folder: Path, questions: Sequence[Question], done: dict[str, ItemResult], watch: FileWatch
) -> None:
    """Checks that what was asked about is what is there now.

    Raises:
        DataError: an audio file has changed.
    """
    for question in questions:
        if (item := done.get(question.key)) is None:
            continue
        for path, before in zip(map(path_of, question.clips()), item.audio, strict=False):
            if before != watch.fingerprint(path):
                raise DataError(
                    f"{path} has changed since {item.id!r} was answered in {str(folder)!r}. Put it back, choose "
                    "another output folder, or overwrite it to start again."
                )


def read_questions(
    dataset: str | os.PathLike[str] | DatasetConfig | Sequence[DataRow], settings: EvaluationOptions
) -> list[Question]:
    """The questions of a benchmark, or of conversations.

    Raises:
        DataError: the data set cannot be used.
    """
    if isinstance(dataset, str | os.PathLike):
        dataset = DatasetConfig(os.fspath(dataset))
    if settings.suite is not None:
        if not isinstance(dataset, DatasetConfig):
            raise ArgumentError(f"suite={settings.suite!r} needs the benchmark's files, not rows.")
        return read_suite(settings.suite, dataset, settings.prompts)
    rows = read_dataset(dataset).rows if isinstance(dataset, DatasetConfig) else list(dataset)
    if not rows:
        raise DataError("there is nothing to evaluate: no rows.")
    return [row_question(row, settings.normalizer) for row in rows]


def row_question(row: DataRow, normalizer: Normalizer = EvaluationOptions.normalizer) -> Question:
    """The last question of a conversation, to be scored against its last answer."""
    compared_as = normalize if normalizer == "plain" else normalize_english
    end = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    asked = [text_of(message) for message in row.messages[:end] if message["role"] == "user"]
    text, reference = asked[-1] if asked else "", text_of(row.messages[end])
    options = options_of(text) if scoring_of(text, reference) == "choice" else {}

    def score_row(question: Question, answer: str) -> ItemResult:
        return score(row.id, text, reference, answer, row.task, row.duration_s, compared_as)

    return Question(
        row.id, text, row.messages[:end], reference, score_row, options, place=row.place,
        duration_s=row.duration_s,
    )  # fmt: skip


def answer_rows(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    rows: Sequence[DataRow],
    batch_size: int = EvaluationOptions.batch_size,
    **options: Any,
) -> Iterator[tuple[str, ItemResult]]:
    """Answers and scores rows, longest first, `batch_size` at a time.

    Yields:
        (place of the row, its result), as answers are complete.
    """
    settings = EvaluationOptions(batch_size=batch_size)
    for question, item in answer_questions(
        model, processor, list(map(row_question, rows)), settings, **options
    ):
        yield question.place, item


def collect(questions: Sequence[Question], done: dict[str, ItemResult]) -> Evaluation:
    """Scores over all questions, and over groups of them."""
    items = [done[question.key] for question in questions]
    groups: dict[str, dict[str, list[ItemResult]]] = {}
    for item in items:
        for name, value in item.groups.items():
            groups.setdefault(name, {}).setdefault(value, []).append(item)
    summaries = {
        name: {value: summarize(part) for value, part in sorted(parts.items())}
        for name, parts in groups.items()
    }
    return Evaluation(summarize(items), summaries, items)


def write_results(
    folder: Path,
    questions: Sequence[Question],
    result: Evaluation,
    manifest: dict[str, Any],
    settings: EvaluationOptions,
) -> None:
    """Writes scores, pictures, the report, and the file that a benchmark wants.

    Raises:
        OutputError: one of them cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    scores = {**result.to_dict(), "normalizer": manifest["normalizer"]}
    write_whole(folder / SUMMARY_FILE, to_json(scores).encode())
    plot_confusion(result.items, folder / CONFUSION_FILE)
    write_report(folder, manifest, result.to_dict(), result.items)
    if settings.suite is not None:
        write_submission(folder, SUITES[settings.suite], questions, result.items)


def make_manifest(
    questions: Sequence[Question],
    settings: EvaluationOptions,
    options: dict[str, Any],
    model: dict[str, Any],
) -> dict[str, Any]:
    """What the answers of a run depend on, for JSON; how many run together is not part of it."""
    suite = None if settings.suite is None else SUITES[settings.suite]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        **model,
        "suite": settings.suite,
        "suite_source": None if suite is None else suite.source,
        "prompts": settings.prompts if suite is not None else None,
        "by": settings.by,
        "normalizer": "whisper" if suite is not None and suite.kind == "speech" else settings.normalizer,
        "decoding": json.loads(
            json.dumps({"max_new_tokens": settings.max_new_tokens, **options}, sort_keys=True, default=str)
        ),
        "bootstrap_seed": BOOTSTRAP_SEED,
        "first_prompt": questions[0].text,
        **fingerprint_questions(questions),
    }


def describe_model(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    adapter: str | None = None,
) -> ModelFacts:
    """Tells models and adapters apart: digests of the configuration, a few values of every weight, and the template."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 16)
        digest.update(f"{name}{to_host(flat[::step].float())}".encode())
    if adapter is not None:
        for name, tensor in model.adapters[adapter].tensors():
            digest.update(f"{name}{to_host(tensor.float().sum())}".encode())
    template = json.dumps(processor.chat_template, sort_keys=True).encode()
    digests = {
        "model_sha256": digest.hexdigest(),
        "dtype": str(model.dtype),
        "chat_template_sha256": hashlib.sha256(template).hexdigest(),
    }
    return ModelFacts(digests, {"do_sample": False, "num_beams": model.generation_config.num_beams})
