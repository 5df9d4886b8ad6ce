"""What the columns of each benchmark mean: rows as they are published to question, options, answer, audio, groups."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audioflamingo.audio.stored import StoredAudio
from audioflamingo.errors import DataError
from audioflamingo.evaluation.published import Record
from audioflamingo.evaluation.scoring import normalize
from audioflamingo.evaluation.speech import normalize_english

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNSCORED_CATEGORIES = ("open", "instruction following")  # of MMAU-Pro
GROUPS = (
    "task", "difficulty", "modality", "category", "sub-category", "task_name", "genre", "dataset", "split", "language"
)  # fmt: skip
_OPTION_LINE = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|$)", re.DOTALL)
_LETTER_AHEAD = re.compile(r"\(?([A-Z])[.):]\s*")


@dataclass(frozen=True)
class Fields:
    """What a row says.

    Attributes:
        id: unique in the data set.
        question: without its options.
        audio: paths, or clips inside the table's file.
        options: texts in order; none for questions without.
        answer: the right option's text, the right words, or a transcript; empty where it is kept back.
        groups: task, difficulty, ...
        is_scored: whether there is a rule for it here.
    """

    id: str
    question: str
    audio: Sequence[str | StoredAudio]
    options: Sequence[str] = ()
    answer: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    is_scored: bool = True


def read_choices(record: Record) -> Fields:
    """MMAU, MMAU-Pro and MMAR: `choices` is a list, `answer` one of them."""
    values = flatten(record.values)
    question = str(first(values, "question", "instruction"))
    options = options_in(values["choices"])
    category = str(values.get("category", "")).lower()
    is_scored = category not in UNSCORED_CATEGORIES and len(options) > 1
    given = str(first(values, "answer", default="") or "")
    answer = right_option(given, options) if is_scored and given else given
    id = first(values, "id", "audio_id", default=question)
    return Fields(str(id), question, audio_of(values), options, answer, groups_of(values), is_scored)


def read_mmsu(record: Record) -> Fields:
    """MMSU: `choice_a` to `choice_d`, `answer_gt` one of their texts."""
    values = flatten(record.values)
    options = [str(values[f"choice_{letter}"]) for letter in "abcd" if values.get(f"choice_{letter}")]
    answer = right_option(str(values["answer_gt"] or ""), options) if values["answer_gt"] else ""
    groups = groups_of(values)
    return Fields(str(values["id"]), str(values["question"]), audio_of(values), options, answer, groups)


def read_muchomusic(record: Record) -> Fields:
    """MuChoMusic: its table, the file that its `prepare_prompts.py` makes of it, or a parquet table with `choices`."""
    values = flatten(record.values)
    if "distractor_1_answer" in values:
        question, identifier = str(values["question"]), str(values["dataset_identifier"])
        answer = str(values["correct_answer"])
        wrong = [
            str(values[f"distractor_{n}_answer"]) for n in (1, 2, 3) if values.get(f"distractor_{n}_answer")
        ]
        options = sorted([answer, *wrong], key=lambda text: _digest(identifier, question, text))
        stem = identifier.removesuffix(".json")
        audio: Sequence[Any] = (stem.rpartition("_")[0] if values.get("dataset") == "musiccaps" else stem,)
    elif "answer_orders" in values:
        options = [str(text) for text in values["answers"]]
        answer = options[list(values["answer_orders"]).index(0)]
        question = re.sub(r"^.*?Question: |\s*Options: .*$", "", str(values["prompt"]), flags=re.DOTALL)
        identifier, audio = str(values["id"]), audio_of(values)
    else:
        question = str(first(values, "instruction", "question"))
        options = options_in(values["choices"])
        answer = right_option(str(values["answer"]), options)
        audio, identifier = audio_of(values), str(values.get("id", ""))
    groups = groups_of(values)
    for name, column in (("knowledge", "music_knowledge"), ("reasoning", "music_reasoning")):
        if values.get(name) or values.get(column) not in (None, "", "[]"):
            groups["skill"] = name
    id = f"{identifier}: {question}" if identifier else question
    return Fields(id, question, audio, options, answer, groups)


def read_clotho(record: Record) -> Fields:
    """Clotho-AQA: one answer a row; rows of the same question are joined by `merge_votes`."""
    values = record.values
    question = str(first(values, "QuestionText", "question")).strip()
    answer = str(values["answer"] or "").strip()
    clip = first(values, "file_name", "audio")
    name = clip if isinstance(clip, str) else str(clip)
    return Fields(f"{name}: {question}", question, (clip,), (), answer)


def merge_votes(rows: Sequence[Fields]) -> Fields:
    """One question of the answers of several people: those with most votes are right."""
    votes: dict[str, int] = {}
    for row in rows:
        votes[normalize(row.answer)] = votes.get(normalize(row.answer), 0) + 1
    most = max(votes.values())
    right = sorted(text for text, count in votes.items() if count == most)
    agreement = "all agree" if len(votes) == 1 else "most agree" if len(right) == 1 else "split"
    kind = "yes or no" if set(right) <= {"yes", "no"} else "word"
    row = rows[0]
    groups = {"answer": kind, "agreement": agreement} if len(rows) > 1 else {"answer": kind}
    return Fields(row.id, row.question, row.audio, (), " | ".join(right), groups)


def read_speech(record: Record) -> Fields | None:
    """LibriSpeech, and the Open ASR Leaderboard's sets: `text` is what is said.

    As on the leaderboard, rows whose transcript is empty once it is normalised, or says that it is not to be scored,
    are left out.
    """
    values = record.values
    text = str(values["text"] or "")
    spoken = normalize_english(text)
    if spoken in ("", "ignore time segment in scoring"):
        return None
    id, dataset = str(first(values, "id", default=record.place)), values.get("dataset")
    return Fields(f"{dataset}/{id}" if dataset else id, "", audio_of(values), (), text, groups_of(values))


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the columns that a conversion has put into `other_attributes` beside the others."""
    inner = values.get("other_attributes")
    return {**(inner if isinstance(inner, dict) else {}), **values}


def first(values: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The value of the first of some columns that is there."""
    return next((values[name] for name in names if values.get(name) is not None), default)


def groups_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What the data say about a question."""
    return {name: str(values[name]) for name in GROUPS if values.get(name) not in (None, "")}


def audio_of(values: Mapping[str, Any]) -> Sequence[str | StoredAudio]:
    """The clips of a row: inside the table's file, or paths."""
    inside = [value for value in values.values() if isinstance(value, StoredAudio)]
    if inside:
        return inside
    given = first(values, "audio_path", "audio_id", "audio", "file", "file_name", "context", default=())
    return [given] if isinstance(given, str) else [str(path) for path in given]


def options_in(value: Any) -> list[str]:
    """The texts of options: a list, JSON of one, or text with `(A) ... (B) ...`; without their letters."""
    if isinstance(value, str):
        value = (
            json.loads(value) if value.startswith("[") else [text for _, text in _OPTION_LINE.findall(value)]
        )
    texts = [str(text) for text in value or ()]
    letters = [match and match[1] for match in map(_LETTER_AHEAD.match, texts)]
    if letters == list(LETTERS[: len(texts)]):
        texts = [_LETTER_AHEAD.sub("", text, count=1) for text in texts]
    return texts


def right_option(answer: str, options: Sequence[str]) -> str:
    """The option that a row's `answer` stands for, by its text or its letter.

    Raises:
        DataError: it is none of them.
    """
    for alike in (str.strip, normalize):
        for text in options:
            if alike(text) == alike(answer):
                return text
    letter = re.fullmatch(r"\(?([A-Z])\)?(?:[.:)\s].*)?", answer.strip(), re.DOTALL)
    if letter and LETTERS.index(letter[1]) < len(options):
        return options[LETTERS.index(letter[1])]
    raise DataError(f"the answer {answer!r} is none of the options {', '.join(map(repr, options))}")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
