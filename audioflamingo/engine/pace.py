"""How much of a prompt one step may take on, so that the answers beside it go on flowing."""

from __future__ import annotations

SMOOTHING = 0.3  # weight of the latest measurement
MIN_TOKENS = 16
START_TOKENS = 128


class Pace:
    """Measures steps, and says how many prompt tokens the next one may take.

    A step that reads a prompt should last no longer than `piece_s` beyond the answers' own part of it, or twice as long
    as without the prompt where that is more.

    Args:
        piece_s: seconds.
        max_tokens: most tokens of prompts in a step.
    """

    def __init__(self, piece_s: float, max_tokens: int) -> None:
        self.piece_s = piece_s
        self._max_tokens = max_tokens
        self._decode_s = 0.0
        self._token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts for the next step."""
        if self._token_s is None:
            return min(START_TOKENS, self._max_tokens)
        affordable = int(max(self.piece_s, self._decode_s) / self._token_s)
        return min(self._max_tokens, max(MIN_TOKENS, affordable))

    def note(self, num_prompt_tokens: int, step_s: float) -> None:
        """Takes the length of a step."""
        if not num_prompt_tokens:
            self._decode_s += SMOOTHING * (step_s - self._decode_s)
            return
        token_s = max(step_s - self._decode_s, step_s / 4) / num_prompt_tokens
        before = token_s if self._token_s is None else self._token_s
        self._token_s = before + SMOOTHING * (token_s - before)
