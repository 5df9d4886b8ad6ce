"""Transcripts as they are written: sentences with case and punctuation, close to Whisper's habits."""

from __future__ import annotations

import re

_HALF_DAY = re.compile(r"\b([ap]) m\b\.?")
_LETTER = re.compile(r"(?<!['’.\w])([b-hj-z])(?!['’\w])")
_PRONOUN = re.compile(r"\bi\b(?!\.)")


def written(text: str) -> str:
    """A transcript (or a word) as it is written: a capital first, a stop at the end, letters as capitals."""
    text = " ".join(text.replace('"', "").split()).rstrip(" ,;:-")
    if not text:
        return ""
    text = _HALF_DAY.sub(r"\1.m.", text)
    text = _PRONOUN.sub("I", _LETTER.sub(lambda match: match[1].upper(), text))
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
