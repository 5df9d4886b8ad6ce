"""Everyday sentences from our own grammar: `grammar/patterns.txt` over the lists of `grammar/lists.txt`.

A pattern holds slots, `{animal}` from a list or `{num:2-40}` from a generator, and choices, `(a|b|)`. A slot
that ends in `^` is capitalised. Numbers come out as words, so that text and speech agree.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .normalise import ONES, normalise, number_words, ordinal_words, year_words

GRAMMAR_DIR = Path(__file__).resolve().parent.parent / "grammar"
NOUN_LISTS = ("animal", "food", "object", "job", "vehicle")

_SLOT = re.compile(r"\{([a-z0-9]+)(?::([0-9]+)(?:-([0-9]+))?)?(\^?)\}")
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_NOUN_CHANGES = (
    (r"\ba (?=[aeio])", "an "),
    (r"\bA (?=[aeio])", "An "),
    (r"\b(the|a|an) (the|a|an|some) ", r"\2 "),
)


def _money(rng: random.Random) -> str:
    currency, coin = rng.choice((("dollars", "cents"), ("euros", "cents"), ("pounds", "pence")))
    whole = number_words(rng.choice((rng.randint(2, 20), rng.randint(2, 99), rng.randint(100, 5000))))
    return f"{whole} {currency}" + (
        f" and {number_words(rng.randint(2, 99))} {coin}" if rng.random() < 0.3 else ""
    )


def _time(rng: random.Random) -> str:
    hour = ONES[rng.randint(1, 12)]
    minute = rng.choice((0, 0, 0, 5, 10, 15, 20, 30, 40, 45, 50, rng.randint(1, 59)))
    part = rng.choice(("", "", "", " in the morning", " in the evening", " a m", " p m"))
    if minute == 0:
        return hour + (part or rng.choice(("", " o'clock")))
    if rng.random() < 0.35:
        spoken = {15: "a quarter", 30: "half"}.get(minute)
        if spoken:
            return f"{spoken} past {hour}"
    return f"{hour} {'oh ' if minute < 10 else ''}{number_words(minute)}{part}"


def _digits(rng: random.Random, low: int, high: int) -> str:
    zero = rng.choice(("zero", "zero", "oh"))
    return " ".join(
        zero if digit == 0 else ONES[digit] for digit in _random_digits(rng, rng.randint(low, high))
    )


def _random_digits(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(0, 9) for _ in range(count)]


def _phone(rng: random.Random) -> str:
    return ", ".join(
        _digits(rng, count, count) for count in rng.choice(((3, 4), (3, 3, 4), (4, 3), (2, 3, 3)))
    )


def _date(rng: random.Random) -> str:
    months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]
    month, day = rng.choice(months), ordinal_words(rng.randint(1, 31))
    return rng.choice((f"{month} {day}", f"the {day} of {month}"))


# name -> function of (rng, low, high); low and high are the numbers after the colon, or the defaults here
GENERATORS: dict[str, tuple[Callable[[random.Random, int, int], str], int, int]] = {
    "num": (lambda rng, low, high: number_words(rng.randint(low, high)), 2, 99),
    "ordinal": (lambda rng, low, high: ordinal_words(rng.randint(low, high)), 1, 31),
    "year": (lambda rng, low, high: year_words(rng.randint(low, high)), 1600, 2039),
    "digits": (_digits, 3, 6),
    "money": (lambda rng, low, high: _money(rng), 0, 0),
    "time": (lambda rng, low, high: _time(rng), 0, 0),
    "phone": (lambda rng, low, high: _phone(rng), 0, 0),
    "date": (lambda rng, low, high: _date(rng), 0, 0),
}


def read_lists(path: Path = GRAMMAR_DIR / "lists.txt") -> dict[str, list[str]]:
    """Reads `name: item | item` lines."""
    lists = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, items = line.split(":", 1)
            lists[name] = [item.strip() for item in items.split("|")]
    return lists


def read_patterns(path: Path = GRAMMAR_DIR / "patterns.txt") -> list[tuple[str, str]]:
    """Reads the patterns as (category, pattern)."""
    category, patterns = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            patterns.append((category, line))
    return patterns


def choose(pattern: str, rng: random.Random) -> str:
    """Replaces each `(a|b|)` of a pattern, from the innermost, by one of its options."""
    while choice := _CHOICE.search(pattern):
        pattern = pattern[: choice.start()] + rng.choice(choice[1].split("|")) + pattern[choice.end() :]
    return pattern


def expand(pattern: str, lists: dict[str, list[str]], rng: random.Random) -> str:
    """One random sentence of a pattern.

    Raises:
        KeyError: a slot is neither a list nor a generator.
    """
    pattern = choose(pattern, rng)
    while slot := _SLOT.search(pattern):
        name, low, high, capital = slot.groups()
        if name in GENERATORS:
            make, default_low, default_high = GENERATORS[name]
            first = int(low) if low else default_low
            value = make(rng, first, int(high) if high else (first if low else default_high))
        else:
            value = rng.choice(lists[name])
        if capital:
            value = "{" + value[1:-1] + "^}" if value.startswith("{") and value.endswith("}") else value
            value = value[:1].upper() + value[1:]
        pattern = pattern[: slot.start()] + value + pattern[slot.end() :]
    return _tidy(pattern)


def _tidy(sentence: str) -> str:
    for search, replacement in _NOUN_CHANGES:
        sentence = re.sub(search, replacement, sentence)
    return as_sentence(sentence)


def nouns() -> list[str]:
    """Names of things."""
    lists = read_lists()
    return [name for key in NOUN_LISTS for name in lists[key] if "{" not in name]


def as_sentence(text: str) -> str:
    """Single spaces, none before a punctuation mark, a capital at the start."""
    text = re.sub(r"\s+([.,?!])", r"\1", re.sub(r"\s+", " ", text)).strip()
    return text[:1].upper() + text[1:]


def template_sentences(per_pattern: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields distinct (category, sentence), at most `per_pattern` from each pattern."""
    lists = read_lists()
    for number, (category, pattern) in enumerate(read_patterns()):
        rng = random.Random(f"{seed}/{number}/{pattern}")
        seen: set[str] = set()
        for _ in range(per_pattern * 2):
            sentence = expand(pattern, lists, rng)
            key = normalise(sentence)
            if key and key not in seen:
                seen.add(key)
                yield category, sentence
            if len(seen) >= per_pattern:
                break
