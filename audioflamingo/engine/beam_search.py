"""Beam search and beam sampling: several candidate answers a prompt, scored by their total log-probability.

`BeamState` is the search of one prompt, plain arithmetic on the host; `BeamSearch` runs the states of a batch
against a model and a cache that it only knows as a function and a `KVCache`. Scores are float32, as the
reference computes them (transformers 5.23.0, `GenerationMixin._beam_search`), so that ties and roundings fall
the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from audioflamingo.engine.sampling import LogitsRules, Uniforms, draw_without_replacement
from audioflamingo.engine.stopping import StopRules
from audioflamingo.errors import AudioFlamingoError
from audioflamingo.kernels.host import to_host
from audioflamingo.network.kv import KVCache

NO_ANSWER_SCORE = np.float32(-1e9)  # an empty place among the answers; what scores no better is not an answer
DEAD = np.float32(-np.inf)  # score of a beam without a valid continuation


@dataclass(frozen=True)
class BeamOptions:
    """How a beam search runs.

    Attributes:
        num_beams: N, candidates kept for each prompt.
        num_return_sequences: answers given for each prompt, at most N.
        length_penalty: an answer's score is its log-probability divided by its length to this power.
        early_stopping: True: stop at N answers. False: stop when the best beam, at its present length, is
            worse than the worst of N answers. `"never"`: the same at the length that suits the beam best.
        do_sample: draw the candidates instead of taking the best.
        num_candidates: K, continuations looked at in each step; enough that N of them do not end in EOS.
    """

    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    do_sample: bool
    num_candidates: int


@dataclass(frozen=True)
class Beam:
    """A partial or complete answer.

    Attributes:
        score: sum of the log-probabilities; of a complete answer: divided by its length to the
            `length_penalty`.
        token_ids: its tokens.
        logprobs: log-probability of each token under the model's raw distribution.
        origins: which beam of its prompt each token continued.
        is_stopped: whether its last token or text completed it.
    """

    score: np.float32
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    is_stopped: bool = False


@dataclass(frozen=True)
class Candidate:
    """One token that would continue one beam; `score` is that of the whole continuation."""

    score: np.float32
    beam: int
    token_id: int
    logprob: float


class BeamState:
    """The search for one prompt.

    Args:
        options: see `BeamOptions`.
        max_new_tokens: length at which every answer ends.
        stop: what else ends an answer.

    Attributes:
        running: N beams, best first.
        answers: at most N complete answers, best first.
        is_done: whether further steps cannot change the answers.
    """

    def __init__(self, options: BeamOptions, max_new_tokens: int, stop: StopRules) -> None:
        self._options = options
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self.running = [Beam(np.float32(0))] + [Beam(DEAD)] * (options.num_beams - 1)
        self.answers: list[Beam] = []
        self.is_done = False

    def advance(self, candidates: list[Candidate]) -> None:
        """Takes the K candidates of one step, in the order in which they were chosen."""
        beams = [self._extend(candidate) for candidate in candidates]
        length = len(beams[0].token_ids)
        is_last = length >= self._max_new_tokens
        num_beams = self._options.num_beams
        complete = [beam for beam in beams[:num_beams] if beam.is_stopped or is_last]
        self._add_answers(complete, length)
        open_beams = [
            beam if not beam.is_stopped else dataclasses.replace(beam, score=DEAD) for beam in beams
        ]
        self.running = sorted(open_beams, key=lambda beam: -beam.score)[:num_beams]
        self.is_done = is_last or self._is_settled(length)

    def _extend(self, candidate: Candidate) -> Beam:
        parent = self.running[candidate.beam]
        token_ids = [*parent.token_ids, candidate.token_id]
        return Beam(
            candidate.score,
            token_ids,
            [*parent.logprobs, candidate.logprob],
            [*parent.origins, candidate.beam],
            is_stopped=candidate.score != DEAD and self._stop.is_complete(token_ids),
        )

    def _add_answers(self, complete: list[Beam], length: int) -> None:
        scored = [dataclasses.replace(beam, score=self._penalized(beam.score, length)) for beam in complete]
        found = [beam for beam in scored if beam.score > NO_ANSWER_SCORE]
        self.answers = sorted(self.answers + found, key=lambda beam: -beam.score)[: self._options.num_beams]

    def _penalized(self, score: np.float32, length: int) -> np.float32:
        return score / np.float32(length**self._options.length_penalty)

    def _is_settled(self, length: int) -> bool:
        if self.running[0].score == DEAD:
            return True
        if len(self.answers) < self._options.num_beams:
            return False
        if self._options.early_stopping is True:
            return True
        if self._options.early_stopping == "never" and self._options.length_penalty > 0:
            length = self._max_new_tokens
        return bool(self._penalized(self.running[0].score, length) <= self.answers[-1].score)


@dataclass
class BeamResult:
    """What a beam search found.

    Attributes:
        answers: for each prompt its answers, best first.
        scores: for each step the scores that candidates were chosen by, `(B * N, V)`, before the beams' own
            were added; NaN for prompts that were done. Empty unless recorded.
        logits: for each step the model's logits, `(B * N, V)`, likewise.
    """

    answers: list[list[Beam]]
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class BeamSearch:
    """Beam search over a batch of prompts; prompts that are done leave the batch.

    Args:
        options: see `BeamOptions`.
        rules: applied to the log-probabilities of each step.
        states: the searches, one a prompt.
        uniforms: random numbers, one row a prompt; needed for `do_sample` only.
        record_scores: keep the scores of each step.
        record_logits: keep the logits of each step.
    """

    def __init__(
        self,
        options: BeamOptions,
        rules: LogitsRules,
        states: list[BeamState],
        uniforms: Uniforms | None = None,
        record_scores: bool = False,
        record_logits: bool = False,
    ) -> None:
        self._options = options
        self._rules = rules
        self._states = states
        self._uniforms = uniforms
        self._record_scores = record_scores
        self._record_logits = record_logits
        self._open = list(range(len(states)))  # prompts that are still searched, in the order of their rows
        self._result = BeamResult([])

    def run(
        self, logits: Tensor, history: Tensor | None, cache: KVCache, decode: Callable[[Tensor], Tensor]
    ) -> BeamResult:
        """Searches until every prompt is done.

        Args:
            logits: `(B, V)` after the prompts.
            history: `(B, L)` ids of the prompts, when the rules need it.
            cache: holds the prompts, B rows; changed.
            decode: maps one new token a row of the cache, `(rows, 1)`, to its logits, `(rows, V)`.

        Raises:
            AudioFlamingoError: NaN among the logits, or fewer answers than asked for because the rules forbid
                the rest.
        """
        num_beams = self._options.num_beams
        rows = [prompt for prompt in self._open for _ in range(num_beams)]
        cache.select(rows)
        index = torch.tensor(rows, device=logits.device)
        logits = logits[index]
        history = None if history is None else history[index]
        num_new_tokens = 0
        while True:
            was_open = list(self._open)
            for prompt, candidates in zip(
                was_open, self._candidates(logits, history, num_new_tokens), strict=True
            ):
                self._states[prompt].advance(candidates)
            num_new_tokens += 1
            self._open = [prompt for prompt in was_open if not self._states[prompt].is_done]
            if not self._open:
                return self._collect()
            first_rows = {prompt: place * num_beams for place, prompt in enumerate(was_open)}
            running = [
                (first_rows[prompt], beam) for prompt in self._open for beam in self._states[prompt].running
            ]
            rows = [first_row + beam.origins[-1] for first_row, beam in running]
            tokens = torch.tensor([[beam.token_ids[-1]] for _, beam in running], device=logits.device)
            cache.select(rows)
            if history is not None:
                history = torch.cat([history[torch.tensor(rows, device=history.device)], tokens], dim=1)
            logits = decode(tokens)

    def _candidates(
        self, logits: Tensor, history: Tensor | None, num_new_tokens: int
    ) -> list[list[Candidate]]:
        """The K candidates of each open prompt, from logits `(open * N, V)`."""
        num_open, vocab_size = len(self._open), logits.shape[1]
        logprobs = logits.log_softmax(-1)
        scores = self._rules(logprobs, history, num_new_tokens)
        self._record(scores, logits)
        beam_scores = [beam.score for prompt in self._open for beam in self._states[prompt].running]
        totals = scores + torch.tensor(np.array(beam_scores), device=scores.device)[:, None]
        totals = totals.view(num_open, -1)  # (open, N * V)
        num_candidates = min(self._options.num_candidates, totals.shape[1])
        if self._uniforms is None:
            places = totals.topk(num_candidates).indices
        else:
            numbers = self._uniforms.draw(self._open, num_candidates).to(totals.device)
            places = draw_without_replacement(totals, numbers)
        chosen = totals.gather(1, places), places, logprobs.view(num_open, -1).gather(1, places)
        return _read_candidates(*chosen, vocab_size)

    def _record(self, scores: Tensor, logits: Tensor) -> None:
        num_beams = self._options.num_beams
        rows = [prompt * num_beams + beam for prompt in self._open for beam in range(num_beams)]
        index = torch.tensor(rows, device=scores.device)
        for wanted, kept, values in (
            (self._record_scores, self._result.scores, scores),
            (self._record_logits, self._result.logits, logits),
        ):
            if wanted:
                full = values.new_full((len(self._states) * num_beams, values.shape[1]), torch.nan)
                kept.append(full.index_copy(0, index, values))

    def _collect(self) -> BeamResult:
        wanted = self._options.num_return_sequences
        for prompt, state in enumerate(self._states):
            if len(state.answers) < wanted:
                raise AudioFlamingoError(
                    f"beam search found {len(state.answers)} of {wanted} answers to prompt {prompt}: the "
                    "options allow the other beams no token. Relax top_k, top_p or no_repeat_ngram_size."
                )
        self._result.answers = [state.answers[:wanted] for state in self._states]
        return self._result


def _read_candidates(
    scores: Tensor, places: Tensor, logprobs: Tensor, vocab_size: int
) -> list[list[Candidate]]:
    """Brings one step's candidates, each tensor `(open, K)`, to the host in one read."""
    bits = torch.stack([scores.view(torch.int32), places.int(), logprobs.view(torch.int32)])
    host = np.array(to_host(bits), dtype=np.int32)
    all_scores, all_places, all_logprobs = host[0].view(np.float32), host[1], host[2].view(np.float32)
    if np.isnan(all_scores).any():
        raise AudioFlamingoError(
            "the model's logits hold NaN; look for NaN in the weights or an overflow of float16."
        )
    return [
        [
            Candidate(score, int(place) // vocab_size, int(place) % vocab_size, float(logprob))
            for score, place, logprob in zip(*row, strict=True)
        ]
        for row in zip(all_scores, all_places, all_logprobs, strict=True)
    ]
