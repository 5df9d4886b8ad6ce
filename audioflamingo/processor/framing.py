"""The sentence around a transcript: the model answers `The spoken content of the audio is "...".`"""

from __future__ import annotations

TRANSCRIPTION_PREFIXES = (
    "The spoken content of the audio is",
    "The transcription of the audio is",
    "The content of the input audio is",
)
QUOTES = ("'", '"')


def strip_framing(text: str) -> str:
    """Takes away a known opening, the full stop behind the quotes, and one pair of matching quotes.

    A text with neither opening nor quotes keeps its full stop: it is the transcript's own.

    Args:
        text: a decoded answer.

    Returns:
        The transcript, without white space around it.
    """
    stripped = text.strip()
    prefix = next((prefix for prefix in TRANSCRIPTION_PREFIXES if stripped.startswith(prefix)), "")
    stripped = stripped[len(prefix) :].strip()
    body = stripped[:-1].strip() if stripped.endswith(".") else stripped
    if len(body) >= 2 and body[0] == body[-1] and body[0] in QUOTES:
        return body[1:-1].strip()
    return body if prefix else stripped
