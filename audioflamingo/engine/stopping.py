"""When an answer is complete: end-of-sequence tokens and stop strings.

The length limit is not here: it belongs to the loops, which also need it to size the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

SPARE_TOKENS = (
    4  # tokens decoded ahead of the longest stop string, for decoders that treat a text's start specially
)


class Decodes(Protocol):
    """A tokenizer, as far as stop strings need one."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any:
        """Returns the text of a list of ids."""
        ...


@dataclass(frozen=True)
class StopRules:
    """Tells whether an answer is complete after its last token.

    Attributes:
        eos_token_ids: tokens any of which ends an answer.
        stop_strings: texts any of which ends an answer; special tokens count with the text they are written
            as.
        tokenizer: turns ids into text; needed for stop strings only.
    """

    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    tokenizer: Decodes | None = None

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        """Whether the last of `new_ids` ends the answer; to be asked after every token.

        A token is at least one byte of text, so a stop string that the last token completes lies within as
        many tokens as it has bytes: only those are decoded.
        """
        if new_ids[-1] in self.eos_token_ids:
            return True
        if not self.stop_strings:
            return False
        assert self.tokenizer is not None
        window = max(len(text.encode()) for text in self.stop_strings) + SPARE_TOKENS
        text = self.tokenizer.decode(list(new_ids[-window:]), skip_special_tokens=False)
        return any(stop in text for stop in self.stop_strings)
