"""The one engine: continuous batching over a pool of keys and values, a step at a time. No thread, no HTTP.

A step runs one token of every answer that has begun, together with prompts, whole or in pieces: requests join and leave
between steps. `generate` runs a batch of them to its end, a conversation one after the other, transcription and
evaluation keep as many going as there is room for, and the server wraps the engine in a thread (`worker`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from itertools import accumulate

import torch
from torch import Tensor

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.audio_encoder import AudioEncoder
from audioflamingo.engine.beam_search import find_candidates
from audioflamingo.engine.captured_steps import (
    MIN_WINDOW,
    DecodeStep,
    Flight,
    StoreSteps,
    captured_steps_of,
    sizes_up_to,
)
from audioflamingo.engine.choosing import (
    apply_rules,
    choose,
    choose_ids,
    chooses_without_history,
    draw_numbers,
    keep_values,
    rows_at,
    takes_likeliest,
    token_logprobs,
)
from audioflamingo.engine.kv_pool import CacheRows, KVPool
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Request
from audioflamingo.engine.sampling import NO_TOKEN, TokenLogprob
from audioflamingo.engine.scheduler import Scheduler, Step
from audioflamingo.engine.sequence import Sequence, SequenceGroup
from audioflamingo.errors import AudioFlamingoError, ContextLengthError
from audioflamingo.kernels.host import to_device
from audioflamingo.network.adapters import routed
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.kv import KVCache
from audioflamingo.processor.prompt import AudioWindow
from audioflamingo.processor.tokenizer import Tokenizer

NOTHING_TO_SAY = (
    "no token can be chosen. Either the model's logits are not finite (NaN in weights or input, an overflow of "
    "float16), or min_new_tokens, no_repeat_ngram_size and constraint together forbid all tokens."
)


class Engine:
    """Answers many prompts at once: `submit` requests, and call `step` as long as it has work.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration` in evaluation mode.
        tokenizer: turns ids into text; None where nobody wants text.
        options: how much it takes on.
        clip_cache: encoded audio to look up and add to; by default one of its own, which is empty.
        cache: a cache whose rows the requests continue, one request a row in the order in which they are submitted.

    Attributes:
        num_steps, num_prompt_tokens, num_new_tokens: counts since the start.
        audio: encodes audio.
        clip_cache: encoded audio; counts windows.
        pool: keys and values.
        scheduler: who waits, whose prompt is read, who is answered.
    """

    def __init__(
        self,
        model: AudioFlamingo3WithHead,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        clip_cache: ClipCache | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self._model = model
        self._tokenizer = tokenizer
        text_config = model.config.text_config
        self._context = text_config.max_position_embeddings
        self._cache = cache
        self._num_continued = 0
        self.clip_cache = clip_cache or ClipCache()
        self.audio = AudioEncoder(model, self.clip_cache)
        size = self.options.cache_tokens
        captured = captured_steps_of(model) if cache is None else None
        self._captured = captured
        self._steps: StoreSteps | None = None if captured is None else captured.lend(model, size)
        self._flight: Flight | None = None
        self._running: DecodeStep | None = None  # the step of the flight
        self.pool = KVPool(
            text_config.num_hidden_layers,
            size or 0,
            grows=size is None,
            store=None if self._steps is None else self._steps.store,
        )
        if self._steps is not None:
            self.pool.reserve_first()  # of rows of no use
        self._rows = self.pool if cache is None else CacheRows(cache)
        self.scheduler = Scheduler(self.pool, self.audio, self.options)
        self.num_steps = self.num_prompt_tokens = self.num_new_tokens = 0

    @property
    def model(self) -> AudioFlamingo3WithHead:
        """What answers."""
        return self._model

    def room(self, num_prompt_tokens: int, num_sequences: int = 1) -> int:
        """Tokens that an answer to a prompt can have at most."""
        space = self._context
        if self.options.cache_tokens is not None:
            space = min(space, self.options.cache_tokens // num_sequences)
        return space - num_prompt_tokens

    def submit(self, request: Request) -> SequenceGroup:
        """Takes a request, to be worked on from the next step on.

        Returns:
            What becomes of it. Its answers also come through `request.on_output`.

        Raises:
            ContextLengthError: the prompt can never fit.
        """
        group = self.prepare(request)
        self.scheduler.add([group])
        return group

    def prepare(self, request: Request) -> SequenceGroup:
        """What becomes of a request once it is added to the scheduler; see `submit`. From any thread."""
        num_prompt, params = len(request.prompt.token_ids), request.params
        room = self.room(num_prompt, params.num_sequences)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens, {request.prompt.num_audio_tokens} of them audio (25 a second); "
                f"at most {num_prompt + room - 1} fit. Shorten the audio or the conversation."
            )
        span = None
        if self._cache is not None:
            span = self._cache.spans[self._num_continued]
            self._num_continued += 1
        salt = 0 if request.adapter is None else self._model.adapters.salt(request.adapter)
        return SequenceGroup(request, min(params.max_new_tokens, room), self._tokenizer, span, salt)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.scheduler.groups)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Runs one token, so that the buffers of the pool are allocated and the kernels are chosen.

        Captures the steps that short prompts need, so that nobody waits for that later.
        """
        span = self.pool.allocate(1)
        assert span is not None
        ids = torch.zeros(1, dtype=torch.long, device=self._model.device)
        view = self.pool.view([span], [1], ids.device)
        self._model.packed_logits(self._model.embed(ids), view, ids)
        self.pool.free(span)
        if self._steps is not None:
            for num_rows in sizes_up_to(self.options.max_rows):
                self._steps.step(num_rows, MIN_WINDOW)

    @torch.no_grad()
    def step(self) -> None:
        """Decides what runs now, runs it, and gives each sequence whose turn it is its next token."""
        if self._flight is not None:
            self._go_on(self._flight)
            return
        step = self.scheduler.schedule()
        if step.windows:
            self._encode(step)
        if not step.chunks:
            return
        start = time.perf_counter()
        captured = self._captured_step(step)
        if captured is None:
            rows, logits = self._run(step)
            if rows:
                self._answer(rows, logits)
        else:
            self._run_captured(captured, [sequence for sequence, _ in step.chunks])
        self._note(step.chunks, time.perf_counter() - start, step.num_prompt_tokens)

    def _note(self, chunks: Rows[tuple[Sequence, int]], step_s: float, num_prompt_tokens: int = 0) -> None:
        """Counts a step."""
        num_tokens = sum(count for _, count in chunks)
        for sequence, count in chunks:
            sequence.group.request.share.service_s += step_s * count / num_tokens
        self.scheduler.budget.note(num_prompt_tokens, step_s)
        self.num_steps += 1

    def close(self) -> None:
        """Hands the slots on, for a caller who is done; every value in them is finite."""
        if self._captured is not None and self._steps is not None and self.options.cache_tokens is None:
            self._captured.give_back(self._steps)
            self._steps = None

    def _captured_step(self, step: Step) -> DecodeStep | None:
        """The captured step that does the work of one; None where it has to be done eagerly."""
        if self._steps is None or any(
            not sequence.new_ids or sequence.group.request.adapter is not None for sequence, _ in step.chunks
        ):
            return None
        most = max(sequence.used_span.length for sequence, _ in step.chunks)
        # Two more: this token, and the one after it, which may be begun before this one is read.
        return self._steps.step(len(step.chunks), most + 2)

    def _run_captured(self, captured: DecodeStep, rows: list[Sequence]) -> None:
        """Runs a captured step, and if nothing forbids it the one behind it before its tokens are read."""
        spans = [sequence.used_span for sequence in rows]
        captured.load([sequence.new_ids[-1] for sequence in rows], spans)
        if all(map(chooses_without_history, rows)):
            self._go_on(self._launch(captured, rows, num_unread=0))
            return
        captured.run()
        for span in spans:
            span.length += 1
        assert captured.logits is not None
        self._answer(rows, captured.logits[: len(rows)].clone())  # the next run writes over them

    def _launch(self, captured: DecodeStep, rows: list[Sequence], num_unread: int) -> Flight:
        """Starts a step whose rows are loaded, or were the last time; its tokens are on their way to the host."""
        captured.run()
        for sequence in rows:
            sequence.used_span.length += 1
        assert captured.logits is not None
        assert captured.chosen is not None
        chosen = captured.chosen[: len(rows)]
        if not takes_likeliest(rows, num_unread):
            chosen = choose_ids(rows, captured.logits[: len(rows)], num_unread)
            captured.feed(chosen)
        self._running = captured
        return Flight.of(rows, chosen)

    def _go_on(self, flight: Flight) -> None:
        """Reads the tokens of a step, after the next one has been started, if the same rows go on."""
        start = time.perf_counter()
        following, self._flight = None, None
        if self._running is not None and self._may_go_on(flight, self._running):
            following = self._launch(self._running, flight.rows, num_unread=1)
        self._take(flight.rows, flight.tokens())
        if following is not None and any(sequence.finish_reason is None for sequence in flight.rows):
            self._flight = following
        self._note([(sequence, 1) for sequence in flight.rows], time.perf_counter() - start)

    def _may_go_on(self, flight: Flight, captured: DecodeStep) -> bool:
        """Whether the next step is sure to be one token of each of the same rows."""
        if self.scheduler.waiting or self.scheduler.reading:
            return False
        running = {id(sequence) for group in self.scheduler.answering for sequence in group.running}
        return running == {id(sequence) for sequence in flight.rows} and all(
            not sequence.group.request.is_cancelled
            and len(sequence.new_ids) + 1 < sequence.group.max_new_tokens
            and sequence.used_span.length < captured.window
            for sequence in flight.rows
        )

    def tidy(self) -> None:
        """Lets cancelled requests go, without running anything."""
        self.scheduler.drop_cancelled()

    def fail(self, groups: Rows[SequenceGroup], error: Exception) -> None:
        """Ends answers with an error."""
        for group in list(groups):
            self.scheduler.finish(group, is_kept=False)
            group.fail(error)

    def _encode(self, step: Step) -> None:
        """Encodes the audio of a step: all of it, or for the time of a piece where others wait."""
        if self.options.piece_s is None:
            by_adapter: dict[str | None, list[tuple[SequenceGroup, AudioWindow]]] = {}
            for group, window in step.windows:
                by_adapter.setdefault(group.request.adapter, []).append((group, window))
            for adapter, members in by_adapter.items():
                encoded = self.audio.encode([window for _, window in members], adapter)
                for (group, window), tokens in zip(members, encoded, strict=True):
                    group.add_audio(window, tokens)
            return
        ((group, window),) = step.windows
        start = time.perf_counter()
        done = self.audio.work(window, self.options.piece_s, group.request.adapter)
        group.request.share.service_s += time.perf_counter() - start
        if done is not None:
            group.add_audio(window, done)

    def _run(self, step: Step) -> tuple[list[Sequence], Tensor]:
        """Runs the chunks of a step. Returns the sequences that get a token, and their logits `(R, V)`."""
        chunks = sorted(step.chunks, key=lambda chunk: chunk[0].first_slot)
        spans = [sequence.used_span for sequence, _ in chunks]
        counts = [count for _, count in chunks]
        adapters = [sequence.group.request.adapter for sequence, _ in chunks]
        with routed(adapters, counts):
            x = self._embed(chunks)
        view = self._rows.view(spans, counts, x.device)
        ends = accumulate(counts)
        answered = [
            (sequence, end - 1)
            for (sequence, count), end in zip(chunks, ends, strict=True)
            if sequence.group.num_unread <= count
        ]
        last = to_device([place for _, place in answered], x.device, torch.long)
        with routed(adapters, counts):
            logits = self._model.packed_logits(x, view, last)
        # Counted in once it has run: a step that fails can be run again.
        self.num_prompt_tokens += step.num_prompt_tokens
        for (sequence, count), span in zip(chunks, spans, strict=True):
            span.length += count
            if not sequence.new_ids:
                sequence.group.forget_audio()
        return self._fork([sequence for sequence, _ in answered], logits)

    def _embed(self, chunks: Rows[tuple[Sequence, int]]) -> Tensor:
        """Embeddings of the next tokens of some sequences, one after the other, `(N, D)`."""
        ids = [token for sequence, count in chunks for token in sequence.next_ids(count)]
        x = self._model.embed(to_device(ids, self._model.device))
        offset = 0
        for sequence, count in chunks:
            if not sequence.new_ids:
                for start, embeds in sequence.group.audio_pieces(count):
                    place = slice(offset + start, offset + start + len(embeds))
                    x[place] = embeds.to(x.device, x.dtype)
            offset += count
        return x

    def _fork(self, rows: list[Sequence], logits: Tensor) -> tuple[list[Sequence], Tensor]:
        """Lets the answers of groups begin whose prompt is done: each sequence of a group gets the same logits."""
        forked: list[Sequence] = []
        sources: list[int] = []
        for place, sequence in enumerate(rows):
            group = sequence.group
            is_first = group.first_token_at is None
            members = group.sequences if is_first else [sequence]
            if is_first:
                group.first_token_at = time.monotonic()
                self.scheduler.begin_answer(group)
            forked += members
            sources += [place] * len(members)
        if len(forked) > len(rows):
            logits = logits[to_device(sources, logits.device)]
        return forked, logits

    def _answer(self, rows: list[Sequence], logits: Tensor) -> None:
        """Gives each row its next token, from `(R, V)`."""
        places = {id(sequence): place for place, sequence in enumerate(rows)}
        plain = [place for place, sequence in enumerate(rows) if sequence.group.search is None]
        if plain:
            self._choose([rows[place] for place in plain], rows_at(logits, plain))
        searching = {id(s.group): s.group for s in rows if s.group.search is not None}
        alike: dict[object, list[SequenceGroup]] = {}
        for group in searching.values():
            params = group.request.params
            num_new = len(group.reader.new_ids)
            key = (params.beams, params.rules, num_new < params.rules.min_new_tokens)
            alike.setdefault(key, []).append(group)
        for groups in alike.values():
            index = [places[id(sequence)] for group in groups for sequence in group.sequences]
            self._search(groups, rows_at(logits, index))

    def _choose(self, rows: list[Sequence], logits: Tensor) -> None:
        """One token for each sequence that chooses token by token."""
        tokens = choose(rows, logits)
        self._take(rows, tokens, token_logprobs(rows, logits, tokens))

    def _take(
        self, rows: list[Sequence], tokens: list[int], logprobs: Rows[TokenLogprob | None] | None = None
    ) -> None:
        """Gives each row its token; a row that was complete before it was read has no use for it."""
        for sequence, token, logprob in zip(rows, tokens, logprobs or [None] * len(rows), strict=True):
            group = sequence.group
            if group.error is not None or sequence.finish_reason is not None or sequence.span is None:
                continue
            self.num_new_tokens += 1
            if token == NO_TOKEN:
                self.fail([group], AudioFlamingoError(NOTHING_TO_SAY))
                continue
            sequence.add_token(token, logprob)
            if group.is_done:
                self.scheduler.finish(group)
            elif sequence.finish_reason is not None:
                self.scheduler.release(sequence)

    def _search(self, groups: list[SequenceGroup], logits: Tensor) -> None:
        """One step of beam searches with the same options, N rows of `(G * N, V)` for each."""
        params = groups[0].request.params
        assert params.beams is not None
        rows = [sequence for group in groups for sequence in group.sequences]
        scores = apply_rules(params.rules, rows, logits.log_softmax(-1), len(rows[0].new_ids))
        keep_values(rows, scores, logits)
        numbers = None
        if params.beams.do_sample:
            sources = [(group.request.uniforms, group.request.first_row) for group in groups]
            numbers = draw_numbers(
                [(u, row) for u, row in sources if u is not None], params.beams.num_candidates
            )
        num_top = max(group.request.params.num_top_logprobs or 0 for group in groups)
        searches = [group.search for group in groups if group.search is not None]
        found = find_candidates(searches, scores, logits, numbers, num_top)
        for group, search, candidates in zip(groups, searches, found, strict=True):
            if isinstance(candidates, AudioFlamingoError):
                self.fail([group], candidates)
                continue
            search.advance(candidates)
            if search.is_done:
                self._end_search(group)
            else:
                self._reorder(group)

    def _end_search(self, group: SequenceGroup) -> None:
        try:
            group.finish_search()
        except AudioFlamingoError as error:
            self.fail([group], error)
            return
        self.num_new_tokens += sum(len(sequence.new_ids) for sequence in group.sequences)
        self.scheduler.finish(group)

    def _reorder(self, group: SequenceGroup) -> None:
        """Lets each sequence go on as the beam that now stands in its place: only answers differ, only they move."""
        assert group.search is not None
        first = group.offset + len(group.prompt.token_ids)
        source: list[int] = []
        target: list[int] = []
        grammars = [sequence.grammar for sequence in group.sequences]
        for sequence, beam in zip(group.sequences, group.search.running, strict=True):
            origin = group.sequences[beam.origins[-1]]
            if origin is not sequence:
                length = origin.used_span.length
                source += range(origin.used_span.start + first, origin.used_span.start + length)
                target += range(sequence.used_span.start + first, sequence.used_span.start + length)
            sequence.new_ids = beam.token_ids
            grammar = grammars[beam.origins[-1]]
            if grammar is not None:
                sequence.grammar = grammar.fork()
                sequence.grammar.accept(beam.token_ids[-1])
        if source:
            device = self._model.device
            self.pool.store.move(to_device(source, device), to_device(target, device))
