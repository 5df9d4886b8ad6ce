"""Ends an answer at a stop text, without ever giving out the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on until it holds one of the stop texts.

    Args:
        stops: the stop texts; none passes everything on.

    Attributes:
        is_found: whether one was found. What stood before it has been passed on, the rest is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def put(self, text: str) -> str:
        """Takes new text; returns what is certain to stand before any stop text."""
        if not self._stops:
            return text
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.is_found = True
            self._held = ""
            return held[: min(places)]
        num_held = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
