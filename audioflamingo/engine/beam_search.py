"""Beam search and beam sampling: several candidate answers a prompt, scored by their total log-probability.

`BeamSearch` is the search for one prompt, plain arithmetic on the host; its beams run as sequences of the engine, which
hands the scores of a step to `find_candidates`. Scores are float32, as the reference computes them (transformers
5.23.0, `GenerationMixin._beam_search`), so that ties and roundings fall the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from audioflamingo.engine.sampling import TokenLogprob, draw_without_replacement, most_likely
from audioflamingo.engine.stopping import StopRules
from audioflamingo.errors import AudioFlamingoError
from audioflamingo.kernels.host import to_host

NO_ANSWER_SCORE = np.float32(-1e9)  # an empty place among the answers; what scores no better is not an answer
NAN_MESSAGE = "the model's logits hold NaN; look for NaN in the weights or an overflow of float16."
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
    logprobs: list[TokenLogprob] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    is_stopped: bool = False


@dataclass(frozen=True)
class Candidate:
    """One token that would continue one beam; `score` is that of the whole continuation, `logprob` the token's own."""

    score: np.float32
    beam: int
    logprob: TokenLogprob


class BeamSearch:
    """The search for one prompt.

    Args:
        options: see `BeamOptions`.
        max_new_tokens: length at which every answer ends.
        stop: what else ends an answer.

    Attributes:
        options: as given.
        running: N beams, best first.
        answers: at most N complete answers, best first.
        is_done: whether further steps cannot change the answers.
    """

    def __init__(self, options: BeamOptions, max_new_tokens: int, stop: StopRules) -> None:
        self.options = options
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
        num_beams = self.options.num_beams
        complete = [beam for beam in beams[:num_beams] if beam.is_stopped or is_last]
        self._add_answers(complete, length)
        open_beams = [
            beam if not beam.is_stopped else dataclasses.replace(beam, score=DEAD) for beam in beams
        ]
        self.running = sorted(open_beams, key=lambda beam: -beam.score)[:num_beams]
        self.is_done = is_last or self._is_settled(length)

    def best(self) -> list[Beam]:
        """The answers that were asked for, best first.

        Raises:
            AudioFlamingoError: there are fewer, because the rules forbid the rest.
        """
        wanted = self.options.num_return_sequences
        if len(self.answers) < wanted:
            raise AudioFlamingoError(
                f"beam search found {len(self.answers)} of {wanted} answers to a prompt: the options allow the other "
                "beams no token. Relax top_k, top_p or no_repeat_ngram_size."
            )
        return self.answers[:wanted]

    def _extend(self, candidate: Candidate) -> Beam:
        parent = self.running[candidate.beam]
        token_ids = [*parent.token_ids, candidate.logprob.token_id]
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
        self.answers = sorted(self.answers + found, key=lambda beam: -beam.score)[: self.options.num_beams]

    def _penalized(self, score: np.float32, length: int) -> np.float32:
        return score / np.float32(length**self.options.length_penalty)

    def _is_settled(self, length: int) -> bool:
        if self.running[0].score == DEAD:
            return True
        if len(self.answers) < self.options.num_beams:
            return False
        if self.options.early_stopping is True:
            return True
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = self._max_new_tokens
        return bool(self._penalized(self.running[0].score, length) <= self.answers[-1].score)


def find_candidates(
    searches: Sequence[BeamSearch], scores: Tensor, logits: Tensor, numbers: Tensor | None, num_top: int = 0
) -> list[list[Candidate] | AudioFlamingoError]:
    """The K candidates of each search in one step.

    Args:
        searches: G of them, with the same options.
        scores: float32 `(G * N, V)`, log-probabilities after the rules, N rows a search in the order of its beams.
        logits: float32 `(G * N, V)`, the model's own.
        numbers: `(G, K)` in [0, 1) to draw with, None to take the best.
        num_top: how many of the most likely tokens are reported beside each candidate.

    Returns:
        The candidates in the order in which they were chosen; an error for a search whose logits hold NaN.
    """
    num_beams, vocab_size = searches[0].options.num_beams, logits.shape[1]
    logprobs = logits.log_softmax(-1)
    beam_scores = [beam.score for search in searches for beam in search.running]
    totals = scores + torch.tensor(np.array(beam_scores), device=scores.device)[:, None]
    totals = totals.view(len(searches), -1)  # (G, N * V)
    num_candidates = min(searches[0].options.num_candidates, totals.shape[1])
    if numbers is None:
        places = totals.topk(num_candidates).indices
    else:
        places = draw_without_replacement(totals, numbers[:, :num_candidates].to(totals.device))
    bits = torch.stack(  # one read for all
        [
            totals.gather(1, places).view(torch.int32),
            places.int(),
            logprobs.view(len(searches), -1).gather(1, places).view(torch.int32),
        ]
    )
    host = np.array(to_host(bits), dtype=np.int32)
    tops = most_likely(logprobs, num_top)
    found: list[list[Candidate] | AudioFlamingoError] = []
    for place, rows in enumerate(
        zip(host[0].view(np.float32), host[1], host[2].view(np.float32), strict=True)
    ):
        if np.isnan(rows[0]).any():
            found.append(AudioFlamingoError(NAN_MESSAGE))
            continue
        candidates = []
        for score, where, logprob in zip(*rows, strict=True):
            beam, token_id = divmod(int(where), vocab_size)
            top = tops[place * num_beams + beam]
            candidates.append(Candidate(score, beam, TokenLogprob(token_id, float(logprob), top)))
        found.append(candidates)
    return found
