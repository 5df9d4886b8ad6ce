"""Answers the questions of a data set and scores the answers; can be stopped and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audioflamingo.datasets.conversations import DataRow, read_dataset, text_of
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.engine.answer_many import answer_many
from audioflamingo.engine.generate_call import prepare_one
from audioflamingo.engine.request import Request
from audioflamingo.errors import ArgumentError, DataError
from audioflamingo.evaluation.confusion_plot import plot_confusion
from audioflamingo.evaluation.evaluation_options import EvaluationOptions
from audioflamingo.evaluation.scoring import ItemResult, Summary, score, summarize
from audioflamingo.files import to_json, write_text
from audioflamingo.kernels.host import to_host
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor

ITEMS_FILE = "items.jsonl"
RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
CONFUSION_FILE = "confusion.png"


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: overall scores, scores by task, and the items in the order of the data."""

    summary: Summary
    by_task: dict[str, Summary]
    items: list[ItemResult]


def evaluate(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    dataset: str | os.PathLike[str] | DatasetConfig | Sequence[DataRow],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    batch_size: int = EvaluationOptions.batch_size,
    max_new_tokens: int = EvaluationOptions.max_new_tokens,
    overwrite: bool = EvaluationOptions.overwrite,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Answers every row's last question and scores it against the row's last answer.

    Answers in a transcription frame are scored by word error rate, questions with options `(A) ... (B) ...` by the
    option chosen, by letter or by text, and all others by exact match. See `scoring` for the normalisation.

    Args:
        model: what is evaluated.
        processor: of the model.
        dataset: a file of conversations, or rows.
        output_dir: for `items.jsonl`, written as answers come, `summary.json` and `confusion.png`. A run that was
            stopped goes on there.
        batch_size: prompts answered at once.
        max_new_tokens: longest answer.
        overwrite: start again where `output_dir` holds another run.
        progress: called with the number of rows that are done and of all, after each.
        **options: further keywords of `generate`, among them `adapter`.

    Raises:
        DataError: the data set cannot be used.
        ArgumentError: `output_dir` holds the items of another model, data set or setting.
    """
    if isinstance(dataset, str | os.PathLike):
        dataset = DatasetConfig(os.fspath(dataset))
    rows = read_dataset(dataset).rows if isinstance(dataset, DatasetConfig) else list(dataset)
    if not rows:
        raise DataError("there is nothing to evaluate: no rows.")
    num_beams = model.generation_config.num_beams  # named, so that it tells runs apart
    options = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": max_new_tokens, **options}
    done: dict[str, ItemResult] = {}
    file = None
    if output_dir is not None:
        folder = Path(output_dir).expanduser()
        done = _open_run(folder, _fingerprint(model, rows, options), overwrite)
        file = (folder / ITEMS_FILE).open("a", encoding="utf-8")
    remaining = [row for row in rows if row.place not in done]
    try:
        for place, item in answer_rows(model, processor, remaining, batch_size, **options):
            done[place] = item
            if file is not None:
                file.write(json.dumps({"place": place, **item.to_dict()}, ensure_ascii=False) + "\n")
                file.flush()
            if progress is not None:
                progress(len(done), len(rows))
    finally:
        if file is not None:
            file.close()
    items = [done[row.place] for row in rows]
    tasks = sorted({item.task or item.scoring for item in items})
    by_task = {name: summarize([i for i in items if (i.task or i.scoring) == name]) for name in tasks}
    result = Evaluation(summarize(items), by_task, items)
    if output_dir is not None:
        scores = {"all": result.summary.to_dict(), **{name: s.to_dict() for name, s in by_task.items()}}
        write_text(folder / SUMMARY_FILE, to_json(scores))
        plot_confusion(items, folder / CONFUSION_FILE)
    return result


def split_row(row: DataRow) -> tuple[list[dict[str, Any]], str, str]:
    """The messages before the last answer, the last question, and that answer."""
    end = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    questions = [text_of(message) for message in row.messages[:end] if message["role"] == "user"]
    return row.messages[:end], questions[-1] if questions else "", text_of(row.messages[end])


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
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}.")
    requests = (
        (row, _request(model, processor, row, options))
        for row in sorted(rows, key=lambda row: -row.duration_s)
    )
    for row, output in answer_many(model, processor.tokenizer, requests, batch_size):
        _, question, reference = split_row(row)
        yield row.place, score(row.id, question, reference, output.text, row.task, row.duration_s)


def _request(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    row: DataRow,
    options: dict[str, Any],
) -> Request:
    prompt = processor.prompt(split_row(row)[0], on_long="truncate")
    return prepare_one(model, prompt, {"tokenizer": processor.tokenizer, **options})


def _open_run(folder: Path, fingerprint: str, overwrite: bool) -> dict[str, ItemResult]:
    """Items that are done; a half-written last line is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    items, run = folder / ITEMS_FILE, folder / RUN_FILE
    if items.exists() and not overwrite:
        known = json.loads(run.read_text(encoding="utf-8")).get("fingerprint") if run.exists() else None
        if known != fingerprint:
            raise ArgumentError(
                f"{str(folder)!r} holds an evaluation of another model, data set or setting; choose another "
                "output_dir, or pass overwrite=True."
            )
        lines = items.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            write_text(items, "".join(whole))
        values = [json.loads(line) for line in whole]
        return {value.pop("place"): ItemResult(**value) for value in values}
    items.unlink(missing_ok=True)
    write_text(run, to_json({"fingerprint": fingerprint}))
    return {}


def _fingerprint(
    model: AudioFlamingo3ForConditionalGeneration, rows: Sequence[DataRow], options: dict[str, Any]
) -> str:
    """Tells runs apart: configuration, a few values of every weight, the rows and the options."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.state_dict().items():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 16)
        digest.update(f"{name}{to_host(flat[::step].float())}".encode())
    if (adapter := options.get("adapter")) is not None:
        for name, tensor in model.adapters[adapter].tensors():
            digest.update(f"{name}{to_host(tensor.float().sum())}".encode())
    for row in rows:
        digest.update(json.dumps([row.place, row.messages], sort_keys=True, default=str).encode())
    digest.update(json.dumps(options, sort_keys=True, default=str).encode())
    return digest.hexdigest()
