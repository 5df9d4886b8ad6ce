"""Thoughts and answer apart: what a thinking checkpoint writes between `<think>` and `</think>` before it answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

OPENING, CLOSING = "<think>", "</think>"
TURN = "<|im_start|>"
_MARKS = re.compile(rf"\s*(?:(?:{OPENING}|{CLOSING})\s*)+")


def ends_in_thoughts(prompt: str) -> bool:
    """Whether a prompt leaves the model within thoughts: its last turn has a `<think>` that is not closed."""
    turn = prompt.rpartition(TURN)[2]
    return turn.rfind(OPENING) > turn.rfind(CLOSING)


def split_thoughts(text: str, is_thinking: bool = False) -> tuple[str | None, str]:
    """Splits a whole answer at its last `</think>`.

    Args:
        text: what the model wrote.
        is_thinking: the prompt ended in thoughts.

    Returns:
        The thoughts, None if there are none, and the answer. Thoughts that do not end used up the answer's length: what
        follows `<think>` is thoughts then, and the answer is empty.
    """
    head, closing, answer = text.rpartition(CLOSING)
    if not closing and is_thinking:
        return text.strip(), ""
    if not closing:
        head, opening, rest = text.partition(OPENING)
        if not opening:
            return None, text
        return rest.strip(), head.strip()
    return _MARKS.sub("\n", head).strip(), answer.lstrip()


class ThoughtSplitter:
    """Splits an answer as it grows; never gives out a part of a mark, nor the white space around one.

    Joined, the pieces are what `split_thoughts` gives, but where a model thinks again after it has begun to answer:
    what it said in between has been given out as the answer then.

    Args:
        is_thinking: the prompt ended in thoughts.
    """

    def __init__(self, is_thinking: bool = False) -> None:
        self._pending = ""
        self._is_thinking = is_thinking
        self._is_start = True  # of the text, or of what follows a mark: white space there is held back
        self._has_marks = is_thinking

    def put(self, text: str) -> list[tuple[bool, str]]:
        """Takes the next text; returns pieces that are now certain, each with whether it is thoughts."""
        self._pending += text
        pieces: list[tuple[bool, str]] = []
        while (mark := self._mark) in self._pending:
            before, _, self._pending = self._pending.partition(mark)
            pieces += self._give(before.rstrip())
            self._is_thinking = not self._is_thinking
            self._is_start = self._has_marks = True
        safe = len(self._pending) - self._held_back()
        piece, self._pending = self._pending[:safe], self._pending[safe:]
        return [*pieces, *self._give(piece)]

    def end(self) -> list[tuple[bool, str]]:
        """What is left, now that nothing follows."""
        rest, self._pending = self._pending, ""
        return self._give(rest.rstrip() if self._is_thinking else rest)

    @property
    def _mark(self) -> str:
        return CLOSING if self._is_thinking else OPENING

    def _held_back(self) -> int:
        """Characters at the end that may belong to a mark, or to the white space before one."""
        text = self._pending
        partial = next((n for n in range(len(self._mark) - 1, 0, -1) if text.endswith(self._mark[:n])), 0)
        body = text[: len(text) - partial]
        return len(text) - len(body.rstrip())

    def _give(self, piece: str) -> list[tuple[bool, str]]:
        if self._is_start and self._has_marks:
            piece = piece.lstrip()
        if not piece:
            return []
        self._is_start = False
        return [(self._is_thinking, piece)]


def split_pieces(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Splits the pieces of one answer; see `ThoughtSplitter`."""
    splitter = ThoughtSplitter()
    for piece in pieces:
        yield from splitter.put(piece)
    yield from splitter.end()
