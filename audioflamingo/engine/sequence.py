"""One answer while it is being given: its prompt's progress, its tokens, its text, its end."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from audioflamingo.engine.kv_pool import Span
from audioflamingo.engine.loops import find_loop
from audioflamingo.engine.request import EngineRequest, FinishReason, Output, TokenLogprob
from audioflamingo.engine.sampling import Uniforms
from audioflamingo.engine.stop_text import StopText
from audioflamingo.processor.prompt import AudioWindow
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer

LOOP_CHECK_TOKENS = 16  # tokens between two looks for loops


class Row:
    """One answer.

    Args:
        request: what is asked.
        tokenizer: turns ids into text.
        eos_token_ids: tokens any of which ends an answer.
        max_new_tokens: longest answer that the context leaves room for.

    Attributes:
        span: its slots of the pool, once it was admitted.
        new_ids: the answer so far.
        arrived: when it was submitted, by `time.monotonic`.
        num_reused: tokens of the prompt that did not need to be computed.
    """

    def __init__(
        self, request: EngineRequest, tokenizer: Tokenizer, eos_token_ids: frozenset[int], max_new_tokens: int
    ) -> None:
        self.request = request
        self.prompt = request.prompt
        self.sampling = request.sampling
        self.max_new_tokens = max_new_tokens
        self.span: Span | None = None
        self.new_ids: list[int] = []
        self.arrived = time.monotonic()
        self.num_reused = 0
        self._audio: dict[int, Tensor] = {}  # by the window's first position
        self._eos_token_ids = eos_token_ids
        self._decoder = StreamDecoder(tokenizer)
        self._stop_text = StopText(self.sampling.stop)
        rules = self.sampling.rules
        self._uniforms = Uniforms(1, [self.sampling.seed]) if rules.do_sample else None
        self._news = Output()

    @property
    def num_slots(self) -> int:
        """Slots that it may need: the last token of an answer is never stored."""
        return len(self.prompt.token_ids) + self.max_new_tokens - 1

    @property
    def alike(self) -> object:
        """Rows for which this is equal can be given their next token together: it depends on nothing of their own."""
        rules, sampling = self.sampling.rules, self.sampling
        if rules.needs_history or sampling.frequency_penalty or sampling.presence_penalty:
            return id(self)
        return rules, len(self.new_ids) < rules.min_new_tokens

    @property
    def identity(self) -> np.ndarray:
        """What makes its tokens unique, see `Prompt.identity`."""
        return np.concatenate([self.prompt.identity, np.array(self.new_ids, dtype=np.int64)])

    def draw(self) -> Tensor:
        """Its next random number, `(1,)` in [0, 1)."""
        assert self._uniforms is not None
        return self._uniforms.draw([0])[:, 0]

    # The prompt

    @property
    def missing_window(self) -> AudioWindow | None:
        """The first audio that the prompt needs and that is not encoded yet."""
        assert self.span is not None
        done = self.span.length
        windows = (w for w in self.prompt.windows if w.num_tokens and w.end > done)
        return next((w for w in windows if w.start not in self._audio), None)

    @property
    def num_ready(self) -> int:
        """Tokens of the prompt that can be run now."""
        assert self.span is not None
        window = self.missing_window
        end = len(self.prompt.token_ids) if window is None else max(window.start, self.span.length)
        return end - self.span.length

    @property
    def is_prompt_done(self) -> bool:
        """Whether only the answer is left."""
        return self.span is not None and self.span.length >= len(self.prompt.token_ids)

    def add_audio(self, window: AudioWindow, embeds: Tensor) -> None:
        """Takes the encoded tokens `(A, D)` of a window."""
        self._audio[window.start] = embeds

    def next_ids(self, num_tokens: int) -> list[int]:
        """The next tokens to run: of the prompt, or the last one of the answer."""
        assert self.span is not None
        if self.is_prompt_done:
            return self.new_ids[-1:]
        return self.prompt.token_ids[self.span.length : self.span.length + num_tokens]

    def audio_pieces(self, num_tokens: int) -> list[tuple[int, Tensor]]:
        """Audio among the next tokens of the prompt: how many tokens on, and the embeddings `(n, D)`."""
        assert self.span is not None
        first, end = self.span.length, self.span.length + num_tokens
        pieces = []
        for window in self.prompt.windows:
            start, stop = max(first, window.start), min(end, window.end)
            if start < stop:
                embeds = self._audio[window.start]
                pieces.append((start - first, embeds[start - window.start : stop - window.start]))
        return pieces

    def forget_audio(self) -> None:
        """Lets go of the windows that lie behind."""
        assert self.span is not None
        for window in self.prompt.windows:
            if window.end <= self.span.length:
                self._audio.pop(window.start, None)

    # The answer

    def add_token(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Takes the next token of the answer, and tells whether that completes it."""
        self.new_ids.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self._eos_token_ids:
            reason = "stop"
        else:
            text = self._stop_text.put(self._decoder.put(token))
            if self._stop_text.is_found:
                reason = "stop"
            elif len(self.new_ids) >= self.max_new_tokens:
                reason = "length"
            elif self.sampling.stops_at_loops and len(self.new_ids) % LOOP_CHECK_TOKENS == 0:
                reason = "loop" if find_loop(self.new_ids) is not None else None
        if reason is not None and not self._stop_text.is_found:
            text += self._stop_text.put(self._decoder.end()) + self._stop_text.end()
        news = self._news
        news.text += text
        news.token_ids.append(token)
        if logprob is not None:
            news.logprobs.append(logprob)
        news.finish_reason = reason
        if reason is not None or (self.request.is_streamed and news.text):
            self._send(news)
        return reason is not None

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error."""
        self._news.error = error
        self._send(self._news)

    def _send(self, news: Output) -> None:
        self._news = Output(first_token_at=news.first_token_at)
        if not self.request.is_cancelled:
            news.num_reused = self.num_reused
            self.request.on_output(news)

    def note_first_token(self) -> None:
        """Remembers when the answer began."""
        self._news.first_token_at = time.monotonic()


def embed(model_embedding: torch.nn.Module, work: list[tuple[Row, int]], device: torch.device) -> Tensor:
    """Embeddings of the next tokens of several rows, one row after the other, `(N, D)`."""
    ids = [token for row, count in work for token in row.next_ids(count)]
    x = model_embedding(torch.tensor(ids, device=device))
    offset = 0
    for row, count in work:
        if not row.is_prompt_done:
            for start, embeds in row.audio_pieces(count):
                place = slice(offset + start, offset + start + len(embeds))
                x[place] = embeds.to(x.device, x.dtype)
        offset += count
    return x
