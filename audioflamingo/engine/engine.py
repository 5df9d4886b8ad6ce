"""Continuous batching: one thread that owns the model and works on all answers at once, step by step.

A step runs one token of every answer that has begun, together with a piece of the prompts that wait: requests join
and leave between steps, and a long prompt or clip is read in pieces that hold nobody up for long. Whoever has had
least of the model goes first (see `Share`), so a short request overtakes a long transcription.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import torch

from audioflamingo.engine import row_sampling
from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.generate_options import eos_ids
from audioflamingo.engine.kv_pool import KVPool, PooledRows
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.memory import give_back_memory
from audioflamingo.engine.pace import Pace
from audioflamingo.engine.request import EngineRequest
from audioflamingo.engine.sampling import NO_TOKEN
from audioflamingo.engine.scheduler import Schedule
from audioflamingo.engine.sequence import Row, embed
from audioflamingo.engine.window_encoder import WindowEncoder
from audioflamingo.errors import AudioFlamingoError, ContextLengthError, EngineStoppedError
from audioflamingo.processor.tokenizer import Tokenizer

logger = logging.getLogger("audioflamingo.server")
TIDY_AFTER_S = 1.0  # without work


class Engine:
    """Gives many answers at once. `start` it, `submit` requests from any thread, `stop` it.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration`; belongs to the engine's thread from `start` on.
        tokenizer: its processor's.
        options: how much it takes on.

    Attributes:
        num_steps, num_prompt_tokens, num_reused_tokens, num_new_tokens: counts since the start.
        encoder: encodes audio; counts windows.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self._model = model.eval()
        self._tokenizer = tokenizer
        text_config = model.config.text_config
        self._space = min(text_config.max_position_embeddings, self.options.cache_tokens)
        self._eos_token_ids = frozenset(eos_ids(model.generation_config))
        self.encoder = WindowEncoder(model, ClipCache(model))
        self.pool = KVPool(text_config.num_hidden_layers, self.options.cache_tokens)
        self.schedule = Schedule(self.pool, self.options.max_rows, self.options.max_requests)
        self._pace = Pace(self.options.piece_s, self.options.max_prefill_tokens)
        self._arriving: deque[Row] = deque()
        self._news = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.num_steps = self.num_prompt_tokens = self.num_reused_tokens = self.num_new_tokens = 0

    # From any thread

    def start(self) -> None:
        """Takes the memory of the cache and starts the model's thread."""
        with torch.no_grad():
            self._warm_up()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that leaves room for an answer of one token."""
        return self._space - 1

    def submit(self, request: EngineRequest) -> None:
        """Takes a request. Its answer comes through `request.on_output`.

        Raises:
            ContextLengthError: the prompt can never fit.
            EngineStoppedError: the engine takes no more.
        """
        num_prompt = len(request.prompt.token_ids)
        if num_prompt > self.max_prompt_tokens:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens, {request.prompt.num_audio_tokens} of them audio (25 a second); "
                f"at most {self.max_prompt_tokens} fit. Shorten the audio or the conversation."
            )
        limit = min(request.sampling.max_new_tokens, self._space - num_prompt)
        row = Row(request, self._tokenizer, self._eos_token_ids, limit)
        with self._news:
            if self._is_stopping:
                raise EngineStoppedError("the server is shutting down; send the request again.")
            self._arriving.append(row)
            self._news.notify()

    def stop(self) -> None:
        """Ends the thread. Answers that are not complete fail with `EngineStoppedError`."""
        with self._news:
            self._is_stopping = True
            self._news.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    # The model's thread

    def _warm_up(self) -> None:
        """Runs one token, so that the buffers of the pool are allocated and the kernels are chosen."""
        span = self.pool.allocate(1)
        assert span is not None
        cache = PooledRows(self.pool, [span], [1])
        ids = torch.zeros(1, dtype=torch.long, device=self._model.device)
        self._model.model.language_model.forward_packed(self._model.get_input_embeddings()(ids), [1], cache)
        self.pool.free(span)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            if not self._wait(TIDY_AFTER_S):
                give_back_memory()
                self._wait()
            with self._news:
                arrived = list(self._arriving)
                self._arriving.clear()
                is_stopping = self._is_stopping
            self.schedule.add(arrived)
            if is_stopping:
                self._fail(
                    self.schedule.rows,
                    EngineStoppedError("the server was shut down before the answer was complete."),
                )
                return
            try:
                self._step()
            except Exception as error:  # the thread must outlive whatever one step meets
                logger.exception("a step of the model failed")
                self._fail(self.schedule.active, error)
                self.schedule.forget()

    def _wait(self, timeout_s: float | None = None) -> bool:
        """Waits until there is something to do; False when the time was over before."""
        with self._news:
            return self._news.wait_for(self._has_work, timeout_s)

    def _has_work(self) -> bool:
        return bool(self._arriving or self.schedule.rows or self._is_stopping)

    def _step(self) -> None:
        schedule = self.schedule
        schedule.drop_cancelled()
        self.num_reused_tokens += schedule.admit()
        prompts = self._choose_prompts()
        self.encoder.forget({w.key for row in schedule.reading if (w := row.missing_window) is not None})
        work = [(row, 1) for row in schedule.answering] + prompts
        if not work:
            return
        start = time.perf_counter()
        self._run_work(work)
        step_s = time.perf_counter() - start
        num_tokens = sum(count for _, count in work)
        for row, count in work:
            row.request.share.service_s += step_s * count / num_tokens
        num_prompt_tokens = sum(count for _, count in prompts)
        self._pace.note(num_prompt_tokens, step_s)
        self.num_steps += 1
        self.num_prompt_tokens += num_prompt_tokens

    def _choose_prompts(self) -> list[tuple[Row, int]]:
        """Which prompts to go on with, and by how many tokens. Whose turn it is but lacks audio has that encoded."""
        chosen: list[tuple[Row, int]] = []
        budget = self._pace.num_tokens
        for row in self.schedule.in_turn(self.schedule.reading):
            self._find_audio(row)
            if not row.num_ready and not chosen:
                self._encode(row)
            count = min(row.num_ready, budget)
            if count:
                chosen.append((row, count))
                budget -= count
            if not budget or not chosen:
                break
        return chosen

    def _find_audio(self, row: Row) -> None:
        while (window := row.missing_window) is not None:
            tokens = self.encoder.find(window)
            if tokens is None:
                return
            row.add_audio(window, tokens)

    def _encode(self, row: Row) -> None:
        """Goes on with the next window that a row needs, for the time of a piece."""
        window = row.missing_window
        assert window is not None
        start = time.perf_counter()
        tokens = self.encoder.work(window, self._pace.piece_s)
        row.request.share.service_s += time.perf_counter() - start
        if tokens is not None:
            row.add_audio(window, tokens)

    def _run_work(self, work: list[tuple[Row, int]]) -> None:
        """Runs the next tokens of some rows, and gives a new one to those whose prompt is done."""
        model = self._model
        spans = [row.span for row, _ in work if row.span is not None]
        num_new = [count for _, count in work]
        x = embed(model.get_input_embeddings(), work, model.device)
        hidden = model.model.language_model.forward_packed(x, num_new, PooledRows(self.pool, spans, num_new))
        rows, last, end = [], [], 0
        for row, count in work:
            end += count
            if row.is_prompt_done:
                rows.append(row)
                last.append(end - 1)
            row.forget_audio()
        if not rows:
            return
        logits = model.lm_head(hidden[torch.tensor(last, device=hidden.device)]).float()  # (R, V)
        tokens = row_sampling.choose(rows, logits)
        logprobs = row_sampling.log_probabilities(rows, logits, tokens)
        self.num_new_tokens += len(rows)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if token == NO_TOKEN:
                self._fail(
                    [row], AudioFlamingoError("the model's logits are not finite, or no token is allowed.")
                )
                continue
            if not row.new_ids:
                row.note_first_token()
                self.schedule.begin_answer(row)
            if row.add_token(token, logprob):
                self.schedule.finish(row)

    def _fail(self, rows: list[Row], error: Exception) -> None:
        for row in list(rows):
            self.schedule.finish(row, is_kept=False)
            row.fail(error)
