"""What the engine is asked for, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from audioflamingo.engine.sampling import LogitsRules
from audioflamingo.processor.prompt import Prompt

FinishReason = Literal["stop", "length", "loop"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends.

    Attributes:
        rules: what is done to the logits, and whether tokens are drawn.
        frequency_penalty: taken from a token's logit for each time that the answer holds it.
        presence_penalty: taken once from the logits of the tokens that the answer holds.
        seed: of the answer's own random numbers, which no neighbour touches.
        stop: texts any of which ends an answer, itself left out.
        max_new_tokens: longest answer.
        stops_at_loops: end an answer that only repeats itself, see `find_loop`.
        num_top_logprobs: None for no log-probabilities, else how many alternatives are reported beside each token.
    """

    rules: LogitsRules = field(default_factory=LogitsRules)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    stops_at_loops: bool = False
    num_top_logprobs: int | None = None


@dataclass(eq=False)
class Share:
    """What one client request has had of the model; several answers (windows, choices) may belong to it.

    Attributes:
        service_s: seconds that the model worked for it.
    """

    service_s: float = 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Output:
    """News of one answer.

    Attributes:
        text: what the answer has grown by, never half a character nor the start of a stop text.
        token_ids: the tokens since the last news, the end token included.
        logprobs: one for each of them, if asked for.
        finish_reason: why the answer is complete; None while it grows.
        error: why it failed.
        num_reused: tokens of the prompt whose keys and values were there already.
        first_token_at: when the answer began, by `time.monotonic`.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_reused: int = 0
    first_token_at: float | None = None

    def joined_to(self, before: Output | None) -> Output:
        """This news and the news before it as one."""
        if before is None:
            return self
        return replace(
            self,
            text=before.text + self.text,
            token_ids=before.token_ids + self.token_ids,
            logprobs=before.logprobs + self.logprobs,
        )

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class EngineRequest:
    """One answer to be given.

    Attributes:
        prompt: what it continues.
        sampling: how.
        on_output: called from the model's thread; must return at once.
        share: the client request that it belongs to.
        is_streamed: whether `on_output` is called after every token; otherwise once, with the whole answer.
    """

    prompt: Prompt
    sampling: Sampling
    on_output: Callable[[Output], None]
    share: Share = field(default_factory=Share)
    is_streamed: bool = True
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Drops the answer at the next step; no further output comes. From any thread, any number of times."""
        self.is_cancelled = True
