"""When an answer is complete, and what of its text may be shown before that is known.

`StopRules` decides, on token ids, for every kind of decoding. `StopText` holds back the beginnings of stop texts while
an answer is shown as it grows. The length limit is not here: it belongs to the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SPARE_TOKENS = (
    4  # tokens decoded ahead of the longest stop string, for decoders that treat a text's start specially
)


class Decodes(Protocol):
    """A tokenizer, as far as stop strings need one."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any:
        """Returns the text of a list of ids."""
        ...


# One of transformers' kind: ids (1, L) of prompt and answer, scores (which are None here) -> a bool, or (1,) of them.
StoppingCriterion = Callable[[torch.Tensor, Any], Any]


@dataclass(frozen=True)
class StopRules:
    """Tells whether an answer is complete after its last token.

    Attributes:
        eos_token_ids: tokens any of which ends an answer.
        stop_strings: texts any of which ends an answer; special tokens count with the text they are written
            as.
        tokenizer: turns ids into text; needed for stop strings only.
        criteria: the caller's own rules, asked for one row at a time.
        prompt_ids: the prompt that they see before the answer.
    """

    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    tokenizer: Decodes | None = None
    criteria: tuple[StoppingCriterion, ...] = ()
    prompt_ids: tuple[int, ...] = ()

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        """Whether the last of `new_ids` ends the answer; to be asked after every token.

        A token is at least one byte of text, so a stop string that the last token completes lies within as
        many tokens as it has bytes: only those are decoded.
        """
        if new_ids[-1] in self.eos_token_ids:
            return True
        if self.criteria:
            ids = torch.tensor([[*self.prompt_ids, *new_ids]], device="cpu")
            if any(bool(criterion(ids, None)) for criterion in self.criteria):
                return True
        if not self.stop_strings:
            return False
        assert self.tokenizer is not None
        window = max(len(text.encode()) for text in self.stop_strings) + SPARE_TOKENS
        text = self.tokenizer.decode(list(new_ids[-window:]), skip_special_tokens=False)
        return any(stop in text for stop in self.stop_strings)


class StopText:
    """Passes text on until it holds one of the stop texts, without ever giving out the start of one.

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
