"""What is being answered: a `SequenceGroup` is one request, its sequences are the rows that the model runs for it.

Most groups have one sequence. Several answers to a prompt, and the beams of a search, are sequences that begin as forks
of the first, once it has read the prompt.
"""

from __future__ import annotations

import time
from functools import cached_property

import numpy as np
from torch import Tensor

from audioflamingo.engine.beam_search import BeamSearch
from audioflamingo.engine.finish_reason import FinishReason
from audioflamingo.engine.loops import find_loop
from audioflamingo.engine.request import Output, Request
from audioflamingo.engine.sampling import TokenLogprob
from audioflamingo.engine.stopping import StopText
from audioflamingo.network.kv import Span
from audioflamingo.processor.prompt import AudioWindow, Prompt
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer

SALT_BIT = 32  # above every token id
LOOP_CHECK_TOKENS = 16  # tokens between two looks for loops


class Detokenizer:
    """The text of an answer as it grows: never half a character nor the start of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop_text = StopText(stop_strings)

    @property
    def is_stopped(self) -> bool:
        """Whether the text holds a stop text."""
        return self._stop_text.is_found

    def put(self, token_id: int) -> str:
        """The text that one more token makes certain."""
        return self._stop_text.put(self._decoder.put(token_id))

    def end(self) -> str:
        """What is left, now that nothing follows."""
        if self.is_stopped:
            return ""
        return self._stop_text.put(self._decoder.end()) + self._stop_text.end()


class Sequence:
    """One row: a prompt and the answer so far.

    Attributes:
        group: what it belongs to.
        index: its place there.
        span: its slots of the cache, once it was admitted; `span.length` tells how far it was computed.
        new_ids: the answer so far.
        logprobs: of its tokens, where they are asked for.
        scores, logits: one `(V,)` a token, where they are to be kept.
        grammar: where the answer stands in what it must be, if it must be something.
        finish_reason: why it is complete.
    """

    def __init__(self, group: SequenceGroup, index: int, detokenizer: Detokenizer | None) -> None:
        self.group = group
        self.index = index
        self.span: Span | None = None
        self.new_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        grammar = group.request.params.grammar
        self.grammar = None if grammar is None else grammar.fork()
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._news = Output(index)

    @property
    def num_computed(self) -> int:
        """Tokens of prompt and answer whose keys and values are there."""
        assert self.span is not None
        return self.span.length - self.group.offset

    @property
    def used_span(self) -> Span:
        """Its slots, of which it has some."""
        assert self.span is not None
        return self.span

    @property
    def first_slot(self) -> int:
        """Where its slots begin: neighbours in the cache are run as neighbours."""
        return self.used_span.start

    def next_ids(self, num_tokens: int) -> list[int]:
        """The next tokens to run: of the prompt, or the last one of the answer."""
        start = self.num_computed
        if start >= len(self.group.prompt.token_ids):
            return self.new_ids[-1:]
        return self.group.prompt.token_ids[start : start + num_tokens]

    def history(self) -> np.ndarray:
        """Ids of the prompt and the answer so far, int64 `(L,)`."""
        return np.concatenate([self.group.prompt_ids, np.array(self.new_ids, dtype=np.int64)])

    def add_token(self, token: int, logprob: TokenLogprob | None) -> None:
        """Takes the next token of the answer; sets `finish_reason` if that completes it."""
        params = self.group.request.params
        self.new_ids.append(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        text = "" if self._detokenizer is None else self._add_text(token)
        self.finish_reason = self._why_complete()
        if self.finish_reason is not None and self._detokenizer is not None:
            text += self._detokenizer.end()
        if self.group.request.on_output is None:
            return
        self._news.text += text
        self._news.token_ids.append(token)
        if logprob is not None and params.num_top_logprobs is not None:
            self._news.logprobs.append(logprob)
        self._news.finish_reason = self.finish_reason
        if self.finish_reason is not None or (self.group.request.is_streamed and self._news.text):
            self.send()

    def _add_text(self, token: int) -> str:
        assert self._detokenizer is not None
        return "" if token in self.group.request.params.stop.eos_token_ids else self._detokenizer.put(token)

    def _why_complete(self) -> FinishReason | None:
        params, count = self.group.request.params, len(self.new_ids)
        if params.stop.is_complete(self.new_ids) or (
            self._detokenizer is not None and self._detokenizer.is_stopped
        ):
            return "stop"
        if count >= self.group.max_new_tokens:
            return "length"
        is_followed = params.stops_at_loops and self.group.search is None
        if is_followed and count % LOOP_CHECK_TOKENS == 0 and find_loop(self.new_ids) is not None:
            return "loop"
        return None

    def send(self, error: Exception | None = None) -> None:
        """Hands out the news."""
        news, self._news = self._news, Output(self.index)
        news.error = error
        news.num_reused = self.group.num_reused
        news.first_token_at = self.group.first_token_at
        if self.group.request.on_output is not None and not self.group.request.is_cancelled:
            self.group.request.on_output(news)


class SequenceGroup:
    """One request while it is answered.

    Args:
        request: what is asked.
        max_new_tokens: longest answer that there is room for.
        tokenizer: turns ids into text, for requests with `on_output`; None where no text is wanted.
        span: slots of a cache that is continued, the tokens before the prompt in it; by default it gets its own.
        salt: number of the adapter that answers, which keeps keys and values apart from those of others; 0 for none.

    Attributes:
        is_continued: its slots are those of a cache that somebody else owns.
        offset: tokens that they held before the prompt.
        sequences: its rows; only the first runs until the prompt is read.
        search: the beam search, if there is one.
        arrived: when it was submitted, by `time.monotonic`.
        first_token_at: when the answer began, likewise.
        num_reused: tokens of the prompt that did not need to be computed.
        error: why it failed.
    """

    def __init__(
        self,
        request: Request,
        max_new_tokens: int,
        tokenizer: Tokenizer | None = None,
        span: Span | None = None,
        salt: int = 0,
    ) -> None:
        params = request.params
        self._salt = np.int64(salt << SALT_BIT)
        self.request = request
        self.prompt: Prompt = request.prompt
        self.prompt_ids = np.array(request.prompt.token_ids, dtype=np.int64)
        self.max_new_tokens = max_new_tokens
        self.is_continued = span is not None
        self.offset = 0 if span is None else span.length
        self.search = None if params.beams is None else BeamSearch(params.beams, max_new_tokens, params.stop)
        self.sequences = []
        for index in range(params.num_sequences):
            detokenizer = None
            if tokenizer is not None and request.on_output is not None and index < params.num_answers:
                detokenizer = Detokenizer(tokenizer, params.stop.stop_strings)
            self.sequences.append(Sequence(self, index, detokenizer))
        self.sequences[0].span = span
        self.arrived = time.monotonic()
        self.first_token_at: float | None = None
        self.num_reused = 0
        self.error: Exception | None = None
        self._audio: dict[int, Tensor] = dict(request.audio)  # projected tokens by the first position

    # The prompt

    @cached_property
    def identity(self) -> np.ndarray:
        """What makes each token unique, int64 `(S,)`: see `Prompt.identity`. No two adapters share one."""
        return self.prompt.identity ^ self._salt if self._salt else self.prompt.identity

    @property
    def reader(self) -> Sequence:
        """The sequence that reads the prompt."""
        return self.sequences[0]

    @property
    def num_slots(self) -> int:
        """Slots that each sequence may need: the last token of an answer is never stored."""
        return len(self.prompt.token_ids) + self.max_new_tokens - 1

    @property
    def missing_windows(self) -> list[AudioWindow]:
        """The audio that the prompt still needs and that is not encoded yet, in order."""
        done = self.reader.num_computed
        return [
            window
            for window in self.prompt.windows
            if window.num_tokens and window.end > done and window.start not in self._audio
        ]

    @property
    def num_unread(self) -> int:
        """Tokens of the prompt that were not run yet."""
        return len(self.prompt.token_ids) - self.reader.num_computed

    @property
    def num_ready(self) -> int:
        """Tokens of the prompt that can be run now, as far as its audio is there."""
        done, missing = self.reader.num_computed, self.missing_windows
        return max(missing[0].start, done) - done if missing else self.num_unread

    def add_audio(self, window: AudioWindow, embeds: Tensor) -> None:
        """Takes the encoded tokens `(A, D)` of a window."""
        self._audio[window.start] = embeds

    def audio_pieces(self, num_tokens: int) -> list[tuple[int, Tensor]]:
        """Audio among the next tokens of the prompt: how many tokens on, and the embeddings `(n, D)`."""
        first = self.reader.num_computed
        end = first + num_tokens
        pieces = []
        for begin, embeds in self._audio.items():
            start, stop = max(first, begin), min(end, begin + len(embeds))
            if start < stop:
                pieces.append((start - first, embeds[start - begin : stop - begin]))
        return pieces

    def forget_audio(self) -> None:
        """Lets go of the audio that lies behind."""
        done = self.reader.num_computed
        self._audio = {start: embeds for start, embeds in self._audio.items() if start + len(embeds) > done}

    # The answer

    @property
    def running(self) -> list[Sequence]:
        """Sequences that are not complete."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    def kept_identity(self) -> np.ndarray:
        """What makes each token of the first sequence unique, as far as its slots are sure to hold them.

        The beams of a search change places: of them only the prompt stays.
        """
        if self.search is not None:
            return self.identity
        return np.concatenate([self.identity, np.array(self.reader.new_ids, dtype=np.int64) ^ self._salt])

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return self.error is not None or not self.running

    def finish_search(self) -> None:
        """Makes the answers that a beam search found those of the first sequences, and hands them out."""
        assert self.search is not None
        for sequence, beam in zip(self.sequences, self.search.best(), strict=False):
            sequence.new_ids, sequence.logprobs, sequence.grammar = [], [], None
            for token, logprob in zip(beam.token_ids, beam.logprobs, strict=True):
                sequence.add_token(token, logprob)
        for sequence in self.running:
            sequence.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """Ends the answers with an error."""
        self.error = error
        for sequence in self.running:
            sequence.finish_reason = "stop"
            if sequence.index < self.request.params.num_answers:
                sequence.send(error)
