"""Scores of one answer, and of many: word error rate, multiple choice, exact match.

Normalisation, for all of them: Unicode NFKC, lower case, typographic apostrophes made plain, everything that is not a
letter, a digit or an apostrophe inside a word becomes a space, runs of space become one. Commas between
thousands go, otherwise numbers stay as they are: "12" and "twelve" differ. No words are mapped to others.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from audioflamingo.errors import require
from audioflamingo.processor.conversation import TRANSCRIPTION_PREFIXES, strip_framing

Scoring = Literal["transcription", "choice", "exact"]
_OPTION = re.compile(r"\(([A-Z])\)\s*(.*?)(?=\s*\([A-Z]\)|[\n;]|$)", re.DOTALL)
_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])(?=[).:,]|\s*$))")
_NOT_WORD = re.compile(r"[^\w']|_")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'+|'+(?!\w)")


@dataclass(frozen=True)
class ItemResult:
    """One scored answer.

    Attributes:
        id: of the row.
        scoring: how it was scored.
        reference, answer: as they stand in the data and as the model wrote it.
        expected, found: what was compared: transcripts, option texts, or answers; normalised.
        is_correct: `expected` equals `found`.
        num_words, num_errors: of transcripts: words of the reference, and substitutions, deletions and insertions.
        task: what the data call the row, or None.
        duration_s: seconds of audio.
    """

    id: str
    scoring: Scoring
    reference: str
    answer: str
    expected: str
    found: str
    is_correct: bool
    num_words: int = 0
    num_errors: int = 0
    task: str | None = None
    duration_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """Scores over items; None where no item has the score.

    Attributes:
        num_items: how many.
        wer: word error rate: all errors over all words of the references.
        choice_accuracy, exact_match: shares that are right; `accuracy` is over both kinds together.
    """

    num_items: int
    wer: float | None = None
    choice_accuracy: float | None = None
    exact_match: float | None = None
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def normalize(text: str) -> str:
    """Applies the module's normalisation."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'").replace("‘", "'")
    text = _THOUSANDS.sub("", text)
    text = _LOOSE_APOSTROPHE.sub(" ", _NOT_WORD.sub(" ", text))
    return " ".join(text.split())


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Errors (substitutions, deletions, insertions) and words of the reference, of normalised texts."""
    if not reference or not hypothesis:  # jiwer refuses empty references
        num_words = len(reference.split())
        return num_words or len(hypothesis.split()), num_words
    output = require("jiwer", "train").process_words(reference, hypothesis)
    return output.substitutions + output.deletions + output.insertions, len(reference.split())


def options_of(question: str) -> dict[str, str]:
    """Options `(A) text (B) text ...` of a question: letter to normalised text; empty if there are fewer than two."""
    options = {letter: normalize(text) for letter, text in _OPTION.findall(question)}
    return options if len(options) >= 2 else {}


def chosen_option(answer: str, options: dict[str, str]) -> str | None:
    """Letter that an answer chooses, by letter or by text; None if it names none or several."""
    if (match := _LETTER.match(answer)) and (letter := match[1] or match[2]) in options:
        return letter
    plain = normalize(answer)
    exact = [letter for letter, text in options.items() if text == plain]
    named = [
        letter for letter, text in options.items() if text and re.search(rf"\b{re.escape(text)}\b", plain)
    ]
    found = exact or named
    return found[0] if len(found) == 1 else None


def scoring_of(question: str, reference: str) -> Scoring:
    """How an answer to `question` is scored: by the form of the reference and of the question."""
    if reference.strip().startswith(TRANSCRIPTION_PREFIXES):
        return "transcription"
    options = options_of(question)
    return "choice" if options and chosen_option(reference, options) is not None else "exact"


def score(
    id: str, question: str, reference: str, answer: str, task: str | None = None, duration_s: float = 0.0
) -> ItemResult:
    """Scores one answer."""
    scoring = scoring_of(question, reference)
    num_errors = num_words = 0
    if scoring == "choice":
        options = options_of(question)
        expected = options[chosen_option(reference, options) or ""]
        letter = chosen_option(answer, options)
        found = normalize(answer) if letter is None else options[letter]
        is_correct = letter == chosen_option(reference, options)
    else:
        is_transcript = scoring == "transcription"
        expected = normalize(strip_framing(reference) if is_transcript else reference)
        found = normalize(strip_framing(answer) if is_transcript else answer)
        is_correct = expected == found
        if is_transcript:
            num_errors, num_words = word_errors(expected, found)
    return ItemResult(
        id, scoring, reference, answer, expected, found, is_correct, num_words, num_errors, task, duration_s
    )


def summarize(items: Sequence[ItemResult]) -> Summary:
    """Scores over items."""

    def share(*kinds: str) -> float | None:
        chosen = [item.is_correct for item in items if item.scoring in kinds]
        return sum(chosen) / len(chosen) if chosen else None

    transcripts = [item for item in items if item.scoring == "transcription"]
    num_words = sum(item.num_words for item in transcripts)
    num_errors = sum(item.num_errors for item in transcripts)
    wer = num_errors / max(1, num_words) if transcripts else None
    return Summary(len(items), wer, share("choice"), share("exact"), share("choice", "exact"))
