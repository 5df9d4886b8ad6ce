"""Conversations as plain data: messages as the processor's chat template takes them, and their checks."""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .setup import RECIPE_DIR
from .templates import as_sentence, choose

TABLES = RECIPE_DIR / "tables"
TRANSCRIPTION = 'The spoken content of the audio is "{text}".'
DEFAULT_PROMPT = "Transcribe the input speech."
LETTERS = "ABCDEF"
HELD_OUT_WORDING = 0.2  # the last fifth of each list of prompts is for the test sets only
PATTERN_SHARE = 0.7
WORN_SHARE = 0.4  # of training's wordings from patterns; see `wear`
MIN_WORDS = 4  # of a wording that may lose one
MIN_LETTERS = 4  # of a word that may be mistyped
OPENERS = (
    "Please:", "Hello,", "Hi!", "So,", "Now", "Question:", "Well,", "And", "Then", "Okay,", "Again:", "Next:", "Hey,",
    "One more thing:", "Listen:", "Excuse me,", "Also,", "But", "Quickly:", "Dear model,", "I wonder:", "Tell me,",
)  # fmt: skip
CLOSERS = (
    "please", "thanks", "thank you", "if you can", "quickly", "now", "exactly", "would you", "or what", "then", "I ask",
    "for my notes", "if possible", "again", "at all", "okay", "as far as you can tell",
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A clip on disk: what a conversation needs to know of it."""

    path: str
    duration_s: float
    label: str
    text: str = ""  # normalised; "" where nothing is said
    original: str = ""  # as it is written
    voice: str = ""  # "man" or "woman", where that is sure


@dataclass(frozen=True)
class Label:
    """How a class of sound is named: in an answer, as a choice, and what one would say about why."""

    phrase: str
    choice: str
    reason: str


def read_table(name: str) -> list[dict[str, str]]:
    """Rows of a tab-separated table of the recipe."""
    with (TABLES / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def read_labels() -> dict[str, Label]:
    """The classes of sound."""
    return {
        row["label"]: Label(row["phrase"], row["choice"], row["reason"]) for row in read_table("labels.tsv")
    }


def read_classes() -> dict[str, str]:
    """Kind of clip -> its class: what cannot be told apart well, such as rain and noise, has one name."""
    return {kind: row["label"] for row in read_table("labels.tsv") for kind in row["kinds"].split()}


class Prompts:
    """Wordings of questions by kind.

    Training has no prompt of the last fifth of a list of `prompts.tsv`, but what the patterns of
    `prompt_patterns.tsv` give; the test has all of the lists and none of these patterns. Of `newcomer_patterns.tsv`
    each fifth pattern of a kind is for the tests only, and they have no other; see `is_allowed`.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        lists = _by_kind("prompts.tsv", "text")
        known = {kind: texts[: int(len(texts) * (1 - HELD_OUT_WORDING))] for kind, texts in lists.items()}
        self.held_out = {text for kind, texts in lists.items() for text in texts[len(known[kind]) :]}
        self.lists = lists if split == "test" else known
        self.patterns = {} if split == "test" else _by_kind("prompt_patterns.tsv", "pattern")
        newcomers = _by_kind("newcomer_patterns.tsv", "pattern")
        for kind, patterns in newcomers.items():
            self.patterns[kind] = self.patterns.get(kind, []) + patterns_of(patterns, split)
        tested = [pattern for patterns in newcomers.values() for pattern in patterns_of(patterns, "test")]
        self.tested = re.compile("|".join(f"({_letters(pattern, '()|')})" for pattern in tested))

    def draw(self, kind: str, rng: random.Random) -> str:
        """One wording; for training mostly of a pattern."""
        if kind not in self.patterns or (kind in self.lists and rng.random() >= PATTERN_SHARE):
            return rng.choice(self.lists[kind])
        while True:
            text = fill_pattern(rng.choice(self.patterns[kind]), rng)
            is_worn = self.split == "train" and rng.random() < WORN_SHARE
            worn = wear(text, rng) if is_worn else text
            if self.is_allowed(text) and self.is_allowed(worn):
                return worn

    def is_allowed(self, text: str) -> bool:
        """Whether a pattern's wording may be used: only by the tests if a test's list or pattern can give it, too."""
        if self.split == "test":
            return True
        return text not in self.held_out and not self.tested.fullmatch(_letters(text))


def patterns_of(patterns: list[str], split: str) -> list[str]:
    """Those of a kind's patterns that a split may use: each fifth is held out."""
    return [pattern for number, pattern in enumerate(patterns) if (number % 5 == 4) == (split == "test")]


def wear(text: str, rng: random.Random) -> str:
    """A wording as somebody in a hurry writes it: a word missing or mistyped, something around it, no capitals.

    Random deletion is the useful half of "easy data augmentation" (arXiv 1901.11196): no single word decides then.
    """
    words = text.split()
    droppable = [place for place, word in enumerate(words) if "{" not in word]
    if len(words) > MIN_WORDS and rng.random() < 0.5:
        del words[rng.choice(droppable)]
    if rng.random() < 0.2:
        place = rng.randrange(len(words))
        words[place] = mistype(words[place], rng)
    if rng.random() < 0.4:
        words.insert(0, rng.choice(OPENERS))
    if rng.random() < 0.25:
        words.append(rng.choice(CLOSERS))
    text = " ".join(words)
    if rng.random() < 0.25:
        text = text.lower().rstrip(".?") or text
    return text


def mistype(word: str, rng: random.Random) -> str:
    """A word with two letters swapped, one missing or one twice, never the first; short ones and fields stay."""
    if len(word) < MIN_LETTERS or not word.isalpha():
        return word
    place = rng.randrange(1, len(word) - 1)
    here, after = word[place], word[place + 1]
    return word[:place] + rng.choice((after + here, after, here + here + after)) + word[place + 2 :]


def fill_pattern(pattern: str, rng: random.Random) -> str:
    """One random wording of a pattern, as a sentence."""
    return as_sentence(choose(pattern, rng))


def _letters(text: str, others: str = "") -> str:
    """The letters of a wording, in lower case: by them it is known again, whatever its marks and spaces."""
    return "".join(letter for letter in text.lower() if letter.isalpha() or letter in others)


def _by_kind(table: str, column: str) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for row in read_table(table):
        kinds.setdefault(row["kind"], []).append(row[column])
    return kinds


def user(text: str | None, clips: list[Clip], audio_first: bool = False) -> dict[str, Any]:
    """A user's message of a question (or none) and clips."""
    parts: list[dict[str, str]] = [{"type": "audio", "path": clip.path} for clip in clips]
    question = [{"type": "text", "text": text}] if text else []
    return {"role": "user", "content": parts + question if audio_first else question + parts}


def assistant(text: str) -> dict[str, Any]:
    """The model's answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversation(
    row_id: str, kind: str, clips: list[Clip], messages: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """A row of a JSON lines file; `more` are facts for evaluation, such as the label."""
    duration_s = round(sum(clip.duration_s for clip in clips), 3)
    paths = [clip.path for clip in clips]
    return {
        "id": row_id,
        "kind": kind,
        "audio": paths,
        "duration_s": duration_s,
        "messages": messages,
        **more,
    }


def transcription_answer(text: str) -> str:
    """The framing that AF3 was trained to give, and that `strip_prefix` takes away."""
    return TRANSCRIPTION.format(text=text)


def choice_question(question: str, options: list[str], rng: random.Random) -> str:
    """A multiple-choice question as on the model's page, with the options in random order.

    The answers of the data are an option's text without its letter: a model of this size names the right option and
    not its letter (runs with letters stayed at chance).
    """
    order = rng.sample(options, len(options))
    shown = [f"({letter}) {option}" for letter, option in zip(LETTERS, order, strict=False)]
    frame = rng.choice(
        (
            "{q} Choose the correct option among the options below: {o}.",
            "{q} Choose the correct option among the options below: {o}.",
            "Instruction: {q} Choose the correct option among the options below: {o}.",
            "{q}\nChoose the correct option from the following options:\n{n}",
            "{q} {o}",
        )
    )
    return frame.format(q=question, o=" ".join(shown), n="\n".join(shown))


def check_conversation(row: dict[str, Any]) -> None:
    """Raises ValueError where a row breaks the schema."""
    roles = [message["role"] for message in row["messages"]]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise ValueError(f"{row['id']}: turns must alternate, user first, assistant last; they are {roles}")
    parts = [part for message in row["messages"] for part in message["content"]]
    paths = [part["path"] for part in parts if part["type"] == "audio"]
    if paths != row["audio"]:
        raise ValueError(f"{row['id']}: audio is {row['audio']}, but the messages hold {paths}")
    for part in parts:
        if part["type"] == "text" and not part["text"].strip():
            raise ValueError(f"{row['id']}: empty text part")
    for path in paths:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{row['id']}: {path} is not relative to the data folder")
