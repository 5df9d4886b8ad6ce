"""Chooses the next token of every row of a step. What a row gets does not depend on who its neighbours are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from audioflamingo.engine.request import TokenLogprob
from audioflamingo.engine.sampling import NO_TOKEN, choose_tokens
from audioflamingo.kernels.host import to_host

if TYPE_CHECKING:
    from audioflamingo.engine.sequence import Row


def choose(rows: Sequence[Row], logits: Tensor) -> list[int]:
    """Chooses one token a row; rows with the same rules are handled together.

    Args:
        rows: R rows.
        logits: float32 `(R, V)`.

    Returns:
        Token ids; `NO_TOKEN` for a row whose logits are not finite or that may not say anything.
    """
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.alike, []).append(index)
    tokens = [NO_TOKEN] * len(rows)
    for members in groups.values():
        found = logits if len(members) == len(rows) else logits[torch.tensor(members, device=logits.device)]
        chosen = to_host(_choose_alike([rows[index] for index in members], found))
        for index, token in zip(members, chosen, strict=True):
            tokens[index] = token
    return tokens


def _choose_alike(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """One token a row, `(R,)`, for rows with the same rules."""
    first, rules = rows[0], rows[0].sampling.rules
    history = None
    if len(rows) == 1:
        logits = _penalize(first, logits)
    if rules.needs_history:
        history = torch.tensor([[*first.prompt.token_ids, *first.new_ids]], device=logits.device)
    scores = rules(logits, history, len(first.new_ids))
    uniforms = None
    if rules.do_sample:
        uniforms = torch.cat([row.draw() for row in rows]).to(scores.device)
    return choose_tokens(scores, uniforms)


def _penalize(row: Row, logits: Tensor) -> Tensor:
    """Lowers the logits `(1, V)` of tokens that the answer holds already."""
    sampling = row.sampling
    if not row.new_ids or not (sampling.frequency_penalty or sampling.presence_penalty):
        return logits
    counts = torch.bincount(torch.tensor(row.new_ids), minlength=logits.shape[1]).to(logits)
    return logits - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty


def log_probabilities(
    rows: Sequence[Row], logits: Tensor, tokens: Sequence[int]
) -> list[TokenLogprob | None]:
    """What the model itself thinks of the chosen tokens, for the rows that ask for it.

    Args:
        rows: R rows.
        logits: float32 `(R, V)`, before any rule.
        tokens: the chosen ids.
    """
    found: list[TokenLogprob | None] = [None] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.sampling.num_top_logprobs is not None and tokens[i] >= 0]
    if not asking:
        return found
    index = torch.tensor(asking, device=logits.device)
    logprobs = logits[index].log_softmax(-1)  # (n, V)
    chosen = torch.tensor([tokens[i] for i in asking], device=logits.device)
    own = to_host(logprobs.gather(1, chosen[:, None]).squeeze(1))
    num_top = max(rows[i].sampling.num_top_logprobs or 0 for i in asking)
    best = logprobs.topk(num_top) if num_top else None
    values, ids = ([[]] * len(asking),) * 2 if best is None else (to_host(best.values), to_host(best.indices))
    for place, i in enumerate(asking):
        count = rows[i].sampling.num_top_logprobs or 0
        top = tuple(zip(ids[place][:count], values[place][:count], strict=True))
        found[i] = TokenLogprob(tokens[i], own[place], top)
    return found
