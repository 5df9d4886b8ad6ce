"""Scores of one answer, and of many: word error rate, multiple choice, exact match.

Normalisation, for all of them: Unicode NFKC, lower case, typographic apostrophes made plain, everything that is not a
letter, a digit or an apostrophe inside a word becomes a space, runs of space become one. Commas between
thousands go, otherwise numbers stay as they are: "12" and "twelve" differ. No words are mapped to others.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from audioflamingo.errors import require
from audioflamingo.processor.conversation import TRANSCRIPTION_PREFIXES, strip_framing
from audioflamingo.processor.thoughts import split_thoughts

Scoring = Literal["transcription", "choice", "exact", "unscored"]
ParsedBy = Literal["text", "letter", "likelihood"]
EXTRA = "evaluate"  # what installs the packages of this room
NUM_RESAMPLES = 1000
BOOTSTRAP_SEED = 0
_OPTION = re.compile(r"\(([A-Z])\)\s*(.*?)(?=\s*\([A-Z]\)|[\n;]|$)", re.DOTALL)
_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])(?=[).:,]|\s*$))")
_LETTER_INSIDE = re.compile(r"\(([A-Z])\)|\b(?:answer|option|choice)\W+(?:is\W+)?([A-Z])\b")
_SENTENCE_END = re.compile(r"[.!?\n]+")
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
        prompt: the question as the model read it.
        parsed_by: how the option was found in the answer; None where it was not, or where there are no options.
        official: whether the rule of the benchmark itself takes the answer; None where it has none that runs here.
        groups: what the data say about the question: task, difficulty, ...
        option_logprobs: log-likelihood of each option, where options were compared.
        error: why there is no answer; None if there is one.
        audio: fingerprint of each file that it was asked about (`files.fingerprint_file`).
        elapsed_s: seconds since the answer before; the sum over a run is its duration.
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
    prompt: str = ""
    parsed_by: ParsedBy | None = None
    official: bool | None = None
    groups: dict[str, str] = field(default_factory=dict)
    option_logprobs: tuple[float, ...] | None = None
    error: str | None = None
    audio: tuple[str, ...] = field(default=(), compare=False)
    elapsed_s: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def is_unparsed(self) -> bool:
        """Whether it was to name an option and none can be found in it; such an answer is wrong."""
        return self.scoring == "choice" and self.parsed_by is None


@dataclass(frozen=True)
class Summary:
    """Scores over items; None where no item has the score.

    Attributes:
        num_items: how many.
        wer: word error rate: all errors over all words of the references.
        choice_accuracy, exact_match: shares that are right; `accuracy` is over both kinds together.
        official_accuracy: share that the benchmark's own rule takes.
        wer_interval, accuracy_interval: 95 % of the scores of samples of as many items, drawn with replacement.
        num_unparsed, num_unscored, num_failed: answers that name no option (wrong), that have no key, and questions
            that could not be asked (wrong).
        rtfx: seconds of audio answered in a second; None where that was not measured.
    """

    num_items: int
    wer: float | None = None
    choice_accuracy: float | None = None
    exact_match: float | None = None
    accuracy: float | None = None
    official_accuracy: float | None = None
    wer_interval: tuple[float, float] | None = None
    accuracy_interval: tuple[float, float] | None = None
    num_unparsed: int = 0
    num_unscored: int = 0
    num_failed: int = 0
    rtfx: float | None = field(default=None, compare=False)

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
    output = require("jiwer", EXTRA).process_words(reference, hypothesis)
    return output.substitutions + output.deletions + output.insertions, len(reference.split())


def options_of(question: str) -> dict[str, str]:
    """Options `(A) text (B) text ...` of a question: letter to normalised text; empty if there are fewer than two."""
    options = {letter: normalize(text) for letter, text in _OPTION.findall(question)}
    return options if len(options) >= 2 else {}


def choose(answer: str, options: Mapping[str, str]) -> tuple[str | None, ParsedBy | None]:
    """The option that an answer chooses.

    Thoughts in `<think>` are left out. Then, the first that applies: the whole answer is one option's text; it begins
    with a letter; it names one option (one that lies within the name of another one named does not count), or its last
    sentence that names any names one; it holds one letter, as `(B)` or behind "answer", "option", "choice".

    Args:
        answer: what the model wrote.
        options: letter to text.

    Returns:
        The letter, and by what it was found; None twice if the answer names none or several.
    """
    _, answer = split_thoughts(answer)
    texts = {letter: normalize(text) for letter, text in options.items()}
    plain = normalize(answer)
    exact = [letter for letter, text in texts.items() if text == plain]
    if exact:  # MMAU has questions with the same option twice
        return exact[0], "text"
    if (match := _LETTER.match(answer)) and (letter := match[1] or match[2]) in options:
        return letter, "letter"
    named = _named(plain, texts)
    if len(named) > 1:
        parts = [found for part in _SENTENCE_END.split(answer) if (found := _named(normalize(part), texts))]
        named = parts[-1] if parts else named
    if len(named) == 1:
        return named[0], "text"
    letters = {a or b for a, b in _LETTER_INSIDE.findall(answer)} & set(options)
    return (letters.pop(), "letter") if len(letters) == 1 and not named else (None, None)


def _named(plain: str, texts: Mapping[str, str]) -> list[str]:
    """Letters of the options that a normalised text names; the longest first, each taken out of it."""
    found = []
    for letter, text in sorted(texts.items(), key=lambda option: -len(option[1])):
        pattern = rf"\b{re.escape(text)}\b"
        if text and re.search(pattern, plain):
            found.append(letter)
            plain = re.sub(pattern, " ", plain)
    return found


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Letter that an answer chooses, by letter or by text, see `choose`; None if it names none or several."""
    return choose(answer, options)[0]


def scoring_of(question: str, reference: str) -> Scoring:
    """How an answer to `question` is scored: by the form of the reference and of the question."""
    if reference.strip().startswith(TRANSCRIPTION_PREFIXES):
        return "transcription"
    options = options_of(question)
    return "choice" if options and chosen_option(reference, options) is not None else "exact"


def score(
    id: str,
    question: str,
    reference: str,
    answer: str,
    task: str | None = None,
    duration_s: float = 0.0,
    compared_as: Callable[[str], str] = normalize,
) -> ItemResult:
    """Scores one answer; `compared_as` makes of a transcript what is compared."""
    scoring = scoring_of(question, reference)
    num_errors = num_words = 0
    parsed_by: ParsedBy | None = None
    if scoring == "choice":
        options = options_of(question)
        expected = options[chosen_option(reference, options) or ""]
        letter, parsed_by = choose(answer, options)
        found = normalize(answer) if letter is None else options[letter]
        is_correct = letter == chosen_option(reference, options)
    else:
        is_transcript = scoring == "transcription"
        expected = compared_as(strip_framing(reference)) if is_transcript else normalize(reference)
        found = compared_as(strip_framing(answer)) if is_transcript else normalize(answer)
        is_correct = expected == found
        if is_transcript:
            num_errors, num_words = word_errors(expected, found)
    return ItemResult(
        id,
        scoring,
        reference,
        answer,
        expected,
        found,
        is_correct,
        num_words,
        num_errors,
        task,
        duration_s,
        prompt=question,
        parsed_by=parsed_by,
        groups={"task": task or scoring},
    )


def bootstrap_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of sum(parts) / sum(wholes): percentiles over samples of the items, drawn with replacement.

    The same numbers give the same interval: the seed is `BOOTSTRAP_SEED`. None for fewer than two items.

    Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", 2004.
    """
    if len(parts) < 2:
        return None
    a, b = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    ratios = []
    for _ in range(NUM_RESAMPLES):
        index = generator.integers(len(a), size=len(a))
        ratios.append(a[index].sum() / max(1.0, b[index].sum()))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def summarize(items: Sequence[ItemResult]) -> Summary:
    """Scores over items."""

    def share(*kinds: str) -> float | None:
        chosen = [item.is_correct for item in items if item.scoring in kinds]
        return sum(chosen) / len(chosen) if chosen else None

    transcripts = [item for item in items if item.scoring == "transcription"]
    errors, words = [item.num_errors for item in transcripts], [item.num_words for item in transcripts]
    keyed = [float(item.is_correct) for item in items if item.scoring in ("choice", "exact")]
    official = [item.official for item in items if item.official is not None]
    audio_s, elapsed_s = sum(item.duration_s for item in items), sum(item.elapsed_s for item in items)
    return Summary(
        len(items),
        wer=sum(errors) / max(1, sum(words)) if transcripts else None,
        choice_accuracy=share("choice"),
        exact_match=share("exact"),
        accuracy=share("choice", "exact"),
        official_accuracy=sum(official) / len(official) if official else None,
        wer_interval=bootstrap_interval(errors, words),
        accuracy_interval=bootstrap_interval(keyed, [1.0] * len(keyed)),
        num_unparsed=sum(item.is_unparsed for item in items),
        num_unscored=sum(item.scoring == "unscored" for item in items),
        num_failed=sum(item.error is not None for item in items),
        rtfx=audio_s / elapsed_s if audio_s and elapsed_s else None,
    )
