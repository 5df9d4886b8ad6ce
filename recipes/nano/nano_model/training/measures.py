"""Answers to a test's questions, for text tokens only, and their scores."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from audioflamingo.datasets.conversations import DataRow, read_dataset, text_of
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.evaluation.scoring import chosen_option, normalize, options_of, scoring_of, word_errors
from audioflamingo.processor.conversation import strip_framing
from audioflamingo.training.batches import Batch, BatchEncoder

from ..vocabulary import QUOTED
from .answering import answer
from .clips import encode_as_they_are
from .forward import FastModel

ROWS_AT_ONCE = 24
MAX_NEW_TOKENS = 200
ABOUT = 0.2  # how far an answered length may be off, and a second at least
WRONG = 0.2  # of the words that are quoted in a description
YES_OR_NO = re.compile(r"^(Yes|No), ")  # the rest says it all
SOMEBODY = re.compile(r"(a man|a woman|someone) is speaking and (he|she|they) says?")

ONES = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""".split()  # noqa: SIM905
TENS = ("twenty", "thirty", "forty", "fifty")
SPOKEN = {word: number for number, word in enumerate(ONES, 1)} | {
    f"{ten} {one}".strip(): 10 * number + rest
    for number, ten in enumerate(TENS, 2)
    for rest, one in enumerate(["", *ONES[:9]])
}


@dataclass(frozen=True)
class Item:
    """An answer and its score; `asked` is what newcomers asked about."""

    id: str
    question: str
    reference: str
    answer: str
    is_right: bool
    num_errors: int = 0
    num_words: int = 0
    asked: str = ""


def score(row: DataRow, found: str, asked: str = "") -> Item:
    """Scores the last answer of a row: words of a transcript, the option of a choice, else every word of it."""
    question, reference = text_of(row.messages[-2]), text_of(row.messages[-1])
    scoring = scoring_of(question, reference)
    errors = words = 0
    if scoring == "transcription":
        said, heard = (normalize(strip_framing(text)) for text in (reference, found))
        errors, words = word_errors(said, heard) if said or heard else (0, 0)
        is_right = errors == 0
    elif scoring == "choice":
        options = options_of(question)
        is_right = chosen_option(found, options) == chosen_option(reference, options)
    elif asked == "duration":
        is_right = is_about(found, row.duration_s)
    elif QUOTED in reference:
        is_right = says_the_same(reference, found)
    else:
        is_right = claims_the_same(reference, found)
    return Item(row.id, question, reference, found, is_right, errors, words, asked)


def is_about(found: str, duration_s: float) -> bool:
    """Whether an answer names a length in seconds that is nearly right."""
    match = re.search(r"about (.*?) seconds?", found)
    if not match or match[1] not in SPOKEN:
        return False
    return abs(SPOKEN[match[1]] - duration_s) <= max(1.0, ABOUT * duration_s)


def claims_the_same(reference: str, found: str) -> bool:
    """Whether two answers are the same in every word, but that one of them may leave out its "Yes," or "No,"."""
    said, wanted = normalize(found), normalize(reference)
    said_bare, wanted_bare = (normalize(YES_OR_NO.sub("", text)) for text in (found, reference))
    return said in (wanted, wanted_bare) or said_bare == wanted


def says_the_same(reference: str, found: str) -> bool:
    """Whether an answer with somebody's words opens as it should, and at most a word in five is wrong, or one.

    Where the reference does not know whether a man or a woman speaks, either may be said.
    """
    (opening, _, said), (found_opening, _, heard) = (text.partition(QUOTED) for text in (reference, found))
    errors, words = word_errors(normalize(said), normalize(heard))
    expected, opened = normalize(opening), normalize(found_opening)
    is_same = expected == opened or (expected.startswith("someone") and bool(SOMEBODY.fullmatch(opened)))
    return is_same and errors <= max(1.0, WRONG * words)


def prompts_of(batch: Batch) -> Batch:
    """A batch without its last answers."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.labels is not None
    mask = batch.attention_mask.clone()
    for row in range(len(mask)):
        is_answer = batch.labels[row] != -100
        end = int(is_answer.nonzero()[-1])
        before = (~is_answer[:end]).nonzero()
        mask[row, int(before[-1]) + 1 :] = 0
    length = int(mask.sum(1).max())
    return dataclasses.replace(
        batch, input_ids=batch.input_ids[:, :length], attention_mask=mask[:, :length], labels=None
    )


def measure(
    fast: FastModel, processor: Any, encoder: BatchEncoder, file: Path, max_rows: int | None = None
) -> Iterator[Item]:
    """Yields the scored answers of a test, shortest clips first."""
    rows = read_dataset(DatasetConfig(str(file), max_rows=max_rows), on_bad_row="skip").rows
    asked = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        asked[value["id"]] = value.get("asked", "")
    assert encoder.cache is not None
    encode_as_they_are(encoder.cache, {path for row in rows for path in row.audio}, fast.model, processor)
    rows.sort(key=lambda row: row.duration_s)
    ends = fast.model.generation_config.eos_token_id
    ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    with torch.inference_mode():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            answers = answer(fast, prompts_of(encoder(part, None)), MAX_NEW_TOKENS, ends)
            texts = processor.batch_decode(answers, skip_special_tokens=True)
            for row, text in zip(part, texts, strict=True):
                yield score(row, text, asked[row.id])


def summary(items: list[Item]) -> dict[str, Any]:
    """Scores over items."""
    words = sum(item.num_words for item in items)
    result: dict[str, Any] = {"items": len(items), "right": sum(item.is_right for item in items) / len(items)}
    if words:
        result["wer"] = sum(item.num_errors for item in items) / words
    for kind in sorted({item.asked for item in items if item.asked}):
        chosen = [item.is_right for item in items if item.asked == kind]
        result.setdefault("by_kind", {})[kind] = sum(chosen) / len(chosen)
    return result
