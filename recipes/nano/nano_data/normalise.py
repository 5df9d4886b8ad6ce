"""Spoken text: numbers as words, and the lower-case form that transcripts are given in."""

from __future__ import annotations

import re

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SCALES = ((1_000_000_000, "billion"), (1_000_000, "million"), (1000, "thousand"), (100, "hundred"))
IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
ABBREVIATIONS = {
    "mr": "mister",
    "mrs": "missus",
    "messrs": "messieurs",
    "dr": "doctor",
    "st": "saint",
    "col": "colonel",
    "capt": "captain",
    "lieut": "lieutenant",
    "rev": "reverend",
    "prof": "professor",
}

_ABBREVIATION = re.compile(r"\b(" + "|".join(ABBREVIATIONS) + r")\b\.?", re.IGNORECASE)
_NOT_SPOKEN = re.compile(r"[^a-z' ]+")
_LOOSE_APOSTROPHE = re.compile(r"(?<![a-z])'|'(?![a-z])")


def number_words(number: int) -> str:
    """Cardinal number in words, American style without "and": 342 -> "three hundred forty two"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f" {ONES[rest]}" if rest else "")
    for scale, name in SCALES:
        if number >= scale:
            count, rest = divmod(number, scale)
            return f"{number_words(count)} {name}" + (f" {number_words(rest)}" if rest else "")
    raise AssertionError("unreachable: every number from 100 has a scale")


def ordinal_words(number: int) -> str:
    """Ordinal number in words: 21 -> "twenty first"."""
    *head, last = number_words(number).split()
    if last in IRREGULAR_ORDINALS:
        last = IRREGULAR_ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return " ".join([*head, last])


def year_words(year: int) -> str:
    """A year as it is said: 1984 -> "nineteen eighty four", 2005 -> "two thousand five"."""
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010 or year % 1000 == 0:
        return number_words(year)
    if rest == 0:
        return f"{number_words(century)} hundred"
    return f"{number_words(century)} {'oh ' if rest < 10 else ''}{number_words(rest)}"


def normalise(text: str) -> str:
    """Transcript form: lower case, letters, apostrophes inside words and single spaces; nothing else.

    Digits must be words already (see `is_speakable`).
    """
    text = text.replace("’", "'").replace("‘", "'").lower()
    text = _ABBREVIATION.sub(lambda match: ABBREVIATIONS[match.group(1).lower()], text)
    text = _NOT_SPOKEN.sub(" ", text)
    text = _LOOSE_APOSTROPHE.sub(" ", text)
    return " ".join(text.split())


def is_speakable(text: str, min_words: int = 1, max_words: int = 45) -> bool:
    """Whether every engine reads `text` as `normalise` writes it: no digits, symbols or foreign letters."""
    if not text.isascii() or re.search(r"[0-9@#$%&*+=<>/\\|~^_{}\[\]]", text):
        return False
    if re.search(r"\b(e\.g|i\.e|etc|viz|vs|cf|esp|approx|vol|fig)\.", text, re.IGNORECASE):
        return False
    if re.search(r"\b[A-Z]{2,}\b|\b[A-Z]\.(?=.)|\.[a-z]|--[^ ]*--", text):  # acronyms, initials, file names
        return False
    return min_words <= len(normalise(text).split()) <= max_words
