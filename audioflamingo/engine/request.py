"""What the engine is asked for, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from audioflamingo.engine.beam_search import BeamOptions
from audioflamingo.engine.constraints import Grammar
from audioflamingo.engine.finish_reason import FinishReason
from audioflamingo.engine.sampling import LogitsRules, TokenLogprob, Uniforms
from audioflamingo.engine.stopping import StopRules
from audioflamingo.processor.prompt import Prompt


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when an answer ends.

    Attributes:
        rules: what is done to the logits, and whether tokens are drawn.
        stop: what ends an answer besides its length.
        max_new_tokens: longest answer.
        num_answers: answers to the prompt, each a sequence of its own; of a beam search, those that it gives.
        beams: search with beams in place of choosing token by token.
        stops_at_loops: end an answer that only repeats itself, see `find_loop`.
        num_top_logprobs: None for no log-probabilities, else how many alternatives are reported beside each token.
        keeps_scores: keep what tokens were chosen by, `(V,)` a token.
        keeps_logits: keep the model's logits, `(V,)` a token.
        grammar: what answers must be, at its beginning; None for anything.
    """

    rules: LogitsRules = field(default_factory=LogitsRules)
    stop: StopRules = field(default_factory=StopRules)
    max_new_tokens: int = 1024
    num_answers: int = 1
    beams: BeamOptions | None = None
    stops_at_loops: bool = False
    num_top_logprobs: int | None = None
    keeps_scores: bool = False
    keeps_logits: bool = False
    grammar: Grammar | None = None

    @property
    def num_sequences(self) -> int:
        """Rows that run at the same time."""
        return self.num_answers if self.beams is None else self.beams.num_beams


@dataclass(eq=False)
class Share:
    """What one client request has had of the model; several answers (windows, choices) may belong to it.

    Attributes:
        service_s: seconds that the model worked for it.
    """

    service_s: float = 0.0


@dataclass
class Output:
    """News of one answer.

    Attributes:
        index: which answer of the request.
        text: what the answer has grown by, never half a character nor the start of a stop text.
        token_ids: the tokens since the last news, the end token included.
        logprobs: one for each of them, if asked for.
        finish_reason: why the answer is complete; None while it grows.
        error: why it failed.
        num_reused: tokens of the prompt whose keys and values were there already.
        first_token_at: when the answer began, by `time.monotonic`.
    """

    index: int = 0
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
            first_token_at=before.first_token_at or self.first_token_at,
        )

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt: what the answers continue.
        params: how.
        on_output: called by whoever runs the engine; must return at once. None for a caller who looks at the
            sequences after each step.
        share: the client request that it belongs to.
        is_streamed: whether `on_output` is called after every token; otherwise once, with the whole answer.
        uniforms: random numbers, where tokens are drawn. Answer i draws as row `first_row + i`, a beam search as row
            `first_row`.
        first_row: see `uniforms`.
        audio: audio that is encoded already, in place of windows: position of the first audio token, and the projected
            tokens `(A, D)`.
        adapter: name of the adapter that answers; None for the model itself.
        is_cancelled: see `cancel`.
    """

    prompt: Prompt
    params: SamplingParams
    on_output: Callable[[Output], None] | None = None
    share: Share = field(default_factory=Share)
    is_streamed: bool = True
    uniforms: Uniforms | None = None
    first_row: int = 0
    audio: tuple[tuple[int, Tensor], ...] = ()
    adapter: str | None = None
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Drops the answers at the next step; no further output comes. From any thread, any number of times."""
        self.is_cancelled = True
