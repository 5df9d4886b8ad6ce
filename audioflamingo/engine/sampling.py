"""From logits to token ids: what `generate` may do to a distribution, and how it draws from it.

Pure functions, one rule each, and a dataclass that applies them in the reference's order. No model, no cache,
no global random state: random numbers come from a `Uniforms` that the caller builds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audioflamingo.kernels.host import to_device, to_host

NO_TOKEN = -1  # in a history: a place without a token; as a choice: the row has no valid distribution


def pack_history(input_ids: Tensor, is_real: Tensor) -> Tensor:
    """Moves the real tokens of each row to the right end, in order, with `NO_TOKEN` before them.

    Args:
        input_ids: `(B, S)` ids with padding anywhere.
        is_real: `(B, S)` bool, False on padding.

    Returns:
        `(B, S)` ids. Rules that look at earlier tokens see the same history whatever the padding was.
    """
    order = is_real.int().argsort(dim=1, stable=True)
    return input_ids.masked_fill(~is_real, NO_TOKEN).gather(1, order)


def penalize_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of tokens that occur in the history (arXiv 1909.05858).

    Args:
        logits: `(B, V)`.
        history: `(B, L)` ids of prompt and answer so far, `NO_TOKEN` where there is none.
        penalty: above 1 makes repetition less likely, below 1 more likely.
    """
    vocab_size = logits.shape[1]
    columns = history.masked_fill((history < 0) | (history >= vocab_size), vocab_size)
    seen = torch.zeros(logits.shape[0], vocab_size + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter_(1, columns, True)[:, :vocab_size]
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def penalize_frequency(logits: Tensor, answers: Tensor, frequency: float, presence: float) -> Tensor:
    """Lowers the logits of tokens that the answer holds already, as the OpenAI interface defines it.

    Args:
        logits: `(B, V)`.
        answers: `(B, T)` ids of the answers so far, `NO_TOKEN` where there is none.
        frequency: taken off once for each time that the answer holds a token.
        presence: taken off once if it holds it at all.
    """
    columns = answers.masked_fill(answers < 0, logits.shape[1])
    counts = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
    counts = counts.scatter_add_(1, columns, torch.ones_like(columns, dtype=logits.dtype))[:, :-1]
    return logits - counts * frequency - (counts > 0) * presence


def ban_repeated_ngrams(logits: Tensor, history: Tensor, size: int) -> Tensor:
    """Forbids tokens that would complete an n-gram of this size which the history already holds.

    Args:
        logits: `(B, V)`.
        history: `(B, L)` ids of prompt and answer so far, `NO_TOKEN` where there is none.
        size: length n of the n-grams, at least 1.
    """
    length, vocab_size = history.shape[1], logits.shape[1]
    if length < size:
        return logits
    ngrams = history.unfold(1, size, 1)  # (B, L - n + 1, n)
    current = history[:, length - size + 1 :]  # (B, n - 1)
    repeats = (ngrams[..., :-1] == current[:, None]).all(-1) & (ngrams >= 0).all(-1)
    banned_ids = ngrams[..., -1].masked_fill(~repeats, vocab_size).clamp(max=vocab_size)
    banned = torch.zeros(logits.shape[0], vocab_size + 1, dtype=torch.bool, device=logits.device)
    return logits.masked_fill(banned.scatter_(1, banned_ids, True)[:, :vocab_size], -torch.inf)


def ban_tokens(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Forbids the listed tokens in every row of `(B, V)`."""
    index = to_device(list(token_ids), logits.device, torch.long)
    return logits.index_fill(1, index, -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keeps the k largest logits of each row of `(B, V)`, and those equal to the k-th."""
    kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float, min_tokens: int = 1) -> Tensor:
    """Keeps the fewest most likely tokens that together reach the probability `top_p` (arXiv 1904.09751).

    Args:
        logits: `(B, V)`.
        top_p: probability to reach, in (0, 1].
        min_tokens: tokens of each row that are kept whatever their probability.
    """
    ascending, order = logits.sort(dim=1)
    is_tail = ascending.softmax(1).cumsum(1) <= 1 - top_p
    is_tail[:, -min_tokens:] = False
    return logits.masked_fill(torch.empty_like(is_tail).scatter_(1, order, is_tail), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float, min_tokens: int = 1) -> Tensor:
    """Keeps tokens at least `min_p` times as likely as the row's most likely one (arXiv 2407.01082).

    Args:
        logits: `(B, V)`.
        min_p: the ratio, in [0, 1].
        min_tokens: tokens of each row that are kept whatever their probability.
    """
    probabilities = logits.softmax(1)
    is_unlikely = probabilities < min_p * probabilities.amax(1, keepdim=True)
    best = probabilities.topk(min(min_tokens, logits.shape[1])).indices
    return logits.masked_fill(is_unlikely.scatter_(1, best, False), -torch.inf)


@dataclass(frozen=True)
class LogitsRules:
    """What is done to the logits before a token is chosen.

    `logit_bias`, `frequency_penalty` and `presence_penalty` come first, then the others in the order of the fields.

    The fields from `temperature` to `min_tokens_to_keep` shape only a draw; beam search hands in log-probabilities.

    Attributes:
        repetition_penalty: see `penalize_repetition`; 1 is off.
        no_repeat_ngram_size: see `ban_repeated_ngrams`; 0 is off.
        min_new_tokens: before that many tokens `eos_token_ids` are forbidden.
        eos_token_ids: the tokens that end an answer.
        do_sample: whether the fields below apply.
        temperature: divides the logits; above 0.
        top_k: see `keep_top_k`; 0 is off.
        top_p: see `keep_top_p`; 1 is off.
        min_p: see `keep_min_p`; None is off.
        min_tokens_to_keep: candidates that top-k, top-p and min-p leave at least.
        frequency_penalty, presence_penalty: see `penalize_frequency`; 0 is off.
        logit_bias: token ids and what is added to their logits, before everything else.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    min_tokens_to_keep: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def needs_history(self) -> bool:
        """Whether a rule looks at the tokens so far."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0

    @property
    def needs_answers(self) -> bool:
        """Whether a rule looks at the answer so far, the prompt apart."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    def __call__(
        self, logits: Tensor, history: Tensor | None, num_new_tokens: int, answers: Tensor | None = None
    ) -> Tensor:
        """Applies the rules.

        Args:
            logits: float32 `(B, V)`; not changed.
            history: `(B, L)` ids, see `pack_history`; may be None unless `needs_history`.
            num_new_tokens: tokens that each answer has so far.
            answers: `(B, T)` ids of the answers so far, likewise; may be None unless `needs_answers`.

        Returns:
            Scores, float32 `(B, V)`, -inf on forbidden tokens.
        """
        if self.logit_bias:
            ids, biases = zip(*self.logit_bias, strict=True)
            index, added = to_device(ids, logits.device), to_device(biases, logits.device, logits.dtype)
            logits = logits.index_add(1, index, added.expand(len(logits), -1))
        if self.needs_answers:
            assert answers is not None
            logits = penalize_frequency(logits, answers, self.frequency_penalty, self.presence_penalty)
        if self.needs_history:
            assert history is not None
            if self.repetition_penalty != 1:
                logits = penalize_repetition(logits, history, self.repetition_penalty)
            if self.no_repeat_ngram_size:
                logits = ban_repeated_ngrams(logits, history, self.no_repeat_ngram_size)
        if num_new_tokens < self.min_new_tokens and self.eos_token_ids:
            logits = ban_tokens(logits, self.eos_token_ids)
        return self._shape(logits) if self.do_sample else logits

    def _shape(self, logits: Tensor) -> Tensor:
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, max(self.top_k, self.min_tokens_to_keep))
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p, self.min_tokens_to_keep)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p, self.min_tokens_to_keep)
        return logits


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token a row by inverting the cumulative distribution over the tokens, most likely first.

    Args:
        probabilities: `(B, V)`, not negative, with a positive sum in each row (which need not be 1).
        uniforms: `(B,)` in [0, 1).

    Returns:
        Ids `(B,)`. A token of probability 0 is never drawn.
    """
    descending, order = probabilities.sort(dim=1, descending=True, stable=True)
    return order.gather(1, _draw_place(descending, uniforms)).squeeze(1)


def _draw_place(descending: Tensor, uniforms: Tensor) -> Tensor:
    """Places `(B, 1)` drawn from falling weights `(B, N)`; the first place where all weights are 0."""
    cumulative = descending.cumsum(1)
    target = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    num_positive = (descending > 0).sum(1, keepdim=True)  # rounding may push the target up to the total
    return place.minimum((num_positive - 1).clamp(min=0))


def draw_without_replacement(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws k different entries a row, one after the other, each in proportion to what is left.

    Args:
        log_weights: `(B, N)`, natural logarithms up to a constant a row; -inf for weight 0.
        uniforms: `(B, k)` in [0, 1), k at most N.

    Returns:
        Indices `(B, k)` in the order of the draws. Once every positive weight is drawn, the rest follow by
        size.
    """
    descending, order = log_weights.sort(dim=1, descending=True, stable=True)
    weights = descending.softmax(1).nan_to_num(0.0)
    drawn = []
    for uniform in uniforms.unbind(1):
        place = _draw_place(weights, uniform)
        drawn.append(order.gather(1, place))
        others = torch.arange(weights.shape[1] - 1, device=weights.device)
        others = others + (others >= place).long()  # (B, N - 1)
        weights, order = weights.gather(1, others), order.gather(1, others)
    return torch.cat(drawn, dim=1)


def choose_tokens(scores: Tensor, uniforms: Tensor | None) -> Tensor:
    """Chooses one token a row.

    Args:
        scores: `(B, V)` after the rules.
        uniforms: `(B,)` in [0, 1) to draw with, None to take the most likely token.

    Returns:
        Ids `(B,)` int64; `NO_TOKEN` where the scores hold NaN or +inf, or forbid every token.
    """
    best, tokens = scores.max(dim=1)
    is_valid = best.isfinite()
    if uniforms is not None:
        probabilities = scores.softmax(1).masked_fill(~is_valid[:, None], 1.0)
        tokens = draw(probabilities, uniforms)
    return tokens.masked_fill(~is_valid, NO_TOKEN)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def log_probabilities(logits: Tensor, tokens: Tensor, num_top: int = 0) -> list[TokenLogprob]:
    """What the model itself thinks of chosen tokens.

    Args:
        logits: `(B, V)`, before any rule.
        tokens: ids `(B,)`.
        num_top: how many of the most likely tokens are reported beside each.
    """
    logprobs = logits.float().log_softmax(-1)
    own = to_host(logprobs.gather(1, tokens[:, None]).squeeze(1))
    ids = to_host(tokens)
    return [
        TokenLogprob(token, value, top)
        for token, value, top in zip(ids, own, most_likely(logprobs, num_top), strict=True)
    ]


def most_likely(logprobs: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    """The most likely tokens of each row of `(B, V)` with their log-probabilities, best first."""
    if not num_top:
        return [()] * len(logprobs)
    best = logprobs.topk(min(num_top, logprobs.shape[1]))
    rows = zip(to_host(best.indices), to_host(best.values), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]


def row_seed(seed: int, row: int) -> int:
    """Seed of one row of the output: the seed itself for row 0, a hash of seed and row for the others."""
    if row == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest(), "big")


class Uniforms:
    """Uniform random numbers for the rows of one `generate` call.

    With seeds each row has its own generator, so what a row draws depends on nothing but its seed. Without,
    the rows draw in order from one generator, finished rows too, so that the numbers do not depend on when a
    neighbour ends.

    Args:
        num_rows: rows of the output.
        seed: a number, from which each row's seed follows by `row_seed`, or a list of one seed a row.
        generator: used when no seed is given; None is PyTorch's global CPU generator.
    """

    def __init__(
        self, num_rows: int, seed: int | Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> None:
        self._num_rows = num_rows
        self._generator = generator
        self._row_generators: list[torch.Generator] | None = None
        if seed is not None:
            seeds = [row_seed(seed, row) for row in range(num_rows)] if isinstance(seed, int) else seed
            self._row_generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]

    @property
    def is_seeded(self) -> bool:
        """Whether each row has its own generator."""
        return self._row_generators is not None

    def draw(self, rows: Sequence[int], count: int = 1) -> Tensor:
        """Draws `count` numbers in [0, 1) for each of `rows`: float32 `(len(rows), count)`."""
        if self._row_generators is not None:
            generators = [self._row_generators[row] for row in rows]
            return torch.stack([torch.rand(count, generator=g, device="cpu") for g in generators])
        device = "cpu" if self._generator is None else self._generator.device
        numbers = torch.rand(self._num_rows, count, generator=self._generator, device=device)
        return numbers.index_select(0, torch.tensor(list(rows), device=device))
