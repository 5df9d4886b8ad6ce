"""Chooses the next token of every sequence of a step. What one gets does not depend on who its neighbours are."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from audioflamingo.engine.sampling import (
    NO_TOKEN,
    LogitsRules,
    TokenLogprob,
    Uniforms,
    choose_tokens,
    log_probabilities,
)
from audioflamingo.engine.sequence import Sequence
from audioflamingo.kernels.host import to_device, to_host


def rows_at(values: Tensor, places: list[int]) -> Tensor:
    """Some rows of `(R, V)`, which is itself if they are all of them in order."""
    if places == list(range(len(values))):
        return values
    return values[to_device(places, values.device)]


def apply_rules(rules: LogitsRules, sequences: Rows[Sequence], logits: Tensor, num_new: int) -> Tensor:
    """Scores `(R, V)` of sequences that share the rules, and on which side of `min_new_tokens` they are.

    Args:
        rules: what is done.
        sequences: R of them.
        logits: `(R, V)`.
        num_new: tokens that an answer of theirs has, also those that the host has not seen yet.
    """
    logits = keep_grammatical(sequences, logits)
    history = answers = None
    if rules.needs_history:
        history = stack_right([sequence.history() for sequence in sequences], logits.device)
    if rules.needs_answers:
        answers = stack_right([np.array(s.new_ids, dtype=np.int64) for s in sequences], logits.device)
    return rules(logits, history, num_new, answers)


def keep_grammatical(sequences: Rows[Sequence], logits: Tensor) -> Tensor:
    """Forbids, in `(R, V)`, what the grammars of the sequences do not allow next; those without one keep everything."""
    if all(sequence.grammar is None for sequence in sequences):
        return logits
    is_allowed = np.ones(tuple(logits.shape), dtype=bool)
    for row, sequence in zip(is_allowed, sequences, strict=True):
        if sequence.grammar is not None:
            allowed = sequence.grammar.allowed()[: len(row)]
            row[: len(allowed)] = allowed
            row[len(allowed) :] = False
    return logits.masked_fill(~to_device(torch.from_numpy(is_allowed), logits.device), -torch.inf)


def stack_right(rows: Rows[np.ndarray], device: torch.device) -> Tensor:
    """Rows of ids as one matrix, each at the right end, `NO_TOKEN` before it."""
    stacked = np.full((len(rows), max(map(len, rows))), NO_TOKEN, dtype=np.int64)
    for place, row in zip(stacked, rows, strict=True):
        place[len(place) - len(row) :] = row
    return to_device(torch.from_numpy(stacked), device)


def draw_numbers(wanted: Rows[tuple[Uniforms, int]], count: int = 1) -> Tensor:
    """Random numbers in [0, 1), float32 `(len(wanted), count)`: those who share a source draw from it together.

    Args:
        wanted: for each, its source and its row there.
        count: numbers for each.
    """
    places: dict[int, list[int]] = {}
    for place, (uniforms, _) in enumerate(wanted):
        places.setdefault(id(uniforms), []).append(place)
    numbers = torch.empty(len(wanted), count, device="cpu")
    for members in places.values():
        uniforms = wanted[members[0]][0]
        drawn = uniforms.draw([wanted[place][1] for place in members], count)
        numbers.index_copy_(0, torch.tensor(members, device="cpu"), drawn.cpu())
    return numbers


def choose(sequences: Rows[Sequence], logits: Tensor) -> list[int]:
    """Chooses one token a sequence, as `choose_ids`, and reads what was chosen."""
    tokens: list[int] = to_host(choose_ids(sequences, logits))
    return tokens


def choose_ids(sequences: Rows[Sequence], logits: Tensor, num_unread: int = 0) -> Tensor:
    """Chooses one token a sequence; those with the same rules are handled together. Nothing is read from the device.

    Keeps scores and logits with the sequences that ask for it.

    Args:
        sequences: R of them.
        logits: float32 `(R, V)`.
        num_unread: tokens that each answer has beyond those that the host has seen; only where
            `chooses_without_history`.

    Returns:
        Token ids, int64 `(R,)`; `NO_TOKEN` for a sequence whose logits are not finite or that may not say anything.
    """
    groups: dict[object, list[int]] = {}
    for place, sequence in enumerate(sequences):
        rules = sequence.group.request.params.rules
        is_early = len(sequence.new_ids) + num_unread < rules.min_new_tokens
        groups.setdefault((rules, is_early), []).append(place)
    if len(groups) == 1:
        return _choose_alike(sequences, logits, num_unread)
    ids = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
    for members in groups.values():
        index = to_device(members, logits.device)
        ids[index] = _choose_alike([sequences[place] for place in members], logits[index], num_unread)
    return ids


def _choose_alike(sequences: Rows[Sequence], logits: Tensor, num_unread: int) -> Tensor:
    rules = sequences[0].group.request.params.rules
    scores = apply_rules(rules, sequences, logits, len(sequences[0].new_ids) + num_unread)
    numbers = None
    if rules.do_sample:
        drawn = draw_numbers([_source(sequence) for sequence in sequences])[:, 0]
        numbers = to_device(drawn, scores.device)
    keep_values(sequences, scores, logits)
    return choose_tokens(scores, numbers)


def chooses_without_history(sequence: Sequence) -> bool:
    """Whether a sequence's next token can be chosen while the host has not seen the last one.

    Numbers that all rows of a call draw in order from one generator are not: whether a row still runs would change
    what the caller's generator gives afterwards.
    """
    request = sequence.group.request
    params = request.params
    return (
        params.beams is None
        and sequence.grammar is None
        and params.num_top_logprobs is None
        and not (params.keeps_scores or params.keeps_logits)
        and not (params.rules.needs_history or params.rules.needs_answers)
        and (not params.rules.do_sample or (request.uniforms is not None and request.uniforms.is_seeded))
    )


def takes_likeliest(sequences: Rows[Sequence], num_unread: int) -> bool:
    """Whether each sequence's next token is the likeliest one, whatever that is."""
    for sequence in sequences:
        rules = sequence.group.request.params.rules
        is_early = len(sequence.new_ids) + num_unread < rules.min_new_tokens
        if rules.do_sample or rules.needs_history or rules.needs_answers or rules.logit_bias or is_early:
            return False
    return True


def keep_values(sequences: Rows[Sequence], scores: Tensor, logits: Tensor) -> None:
    """Leaves scores and logits, each `(R, V)`, with the sequences that ask for them."""
    for row, sequence in enumerate(sequences):
        params = sequence.group.request.params
        if params.keeps_scores:
            sequence.scores.append(scores[row])
        if params.keeps_logits:
            sequence.logits.append(logits[row])


def _source(sequence: Sequence) -> tuple[Uniforms, int]:
    request = sequence.group.request
    assert request.uniforms is not None
    return request.uniforms, request.first_row + sequence.index


def token_logprobs(sequences: Rows[Sequence], logits: Tensor, tokens: Rows[int]) -> list[TokenLogprob | None]:
    """What the model itself thinks of the chosen tokens, for the sequences that ask for it.

    Args:
        sequences: R of them.
        logits: float32 `(R, V)`, before any rule.
        tokens: the chosen ids.
    """
    found: list[TokenLogprob | None] = [None] * len(sequences)
    counts = {
        place: count
        for place, sequence in enumerate(sequences)
        if (count := sequence.group.request.params.num_top_logprobs) is not None and tokens[place] >= 0
    }
    if not counts:
        return found
    index = torch.tensor(list(counts), device=logits.device)
    chosen = torch.tensor([tokens[place] for place in counts], device=logits.device)
    entries = log_probabilities(logits[index], chosen, max(counts.values()))
    for (place, count), entry in zip(counts.items(), entries, strict=True):
        found[place] = TokenLogprob(entry.token_id, entry.logprob, entry.top[:count])
    return found
