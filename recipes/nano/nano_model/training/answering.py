"""Greedy answers to many prompts at once, for text tokens only: what the package's `generate` gives, several times as
fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from audioflamingo.training.batches import Batch

from ..layout import rms_norm
from .forward import HIDDEN, FastModel, Keys, Side


@torch.inference_mode()
def answer(fast: FastModel, batch: Batch, max_new_tokens: int, ends: tuple[int, ...]) -> list[list[int]]:
    """Tokens of each row's answer, without the one that ends it.

    Args:
        fast: the model.
        batch: prompts, padded on the right; labels are not looked at.
        max_new_tokens: at most.
        ends: tokens that end an answer.
    """
    kept: list[Keys] = []
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    states, text = fast.hidden(ids, mask, batch.audio_rows, kept)
    is_audio = (ids == fast.model.config.audio_token_id) & mask
    text_shown, audio_shown = shown(text), shown(Side.of(is_audio))
    last = torch.zeros(len(ids), dtype=torch.long).index_reduce_(
        0, text.rows, torch.arange(len(text.rows)), "amax"
    )
    x, lengths = states[last], mask.sum(1)
    answers: list[list[int]] = [[] for _ in ids]
    is_open = torch.ones(len(ids), dtype=torch.bool)
    rows = torch.arange(len(ids))
    for step in range(max_new_tokens):
        tokens = fast.model.lm_head(x).argmax(-1)
        is_open &= ~torch.isin(tokens, torch.tensor(ends))
        if not is_open.any():
            break
        for row in is_open.nonzero()[:, 0].tolist():
            answers[row].append(int(tokens[row]))
        side = Side(rows, torch.zeros_like(rows), lengths + step, (len(ids), 1))
        added = torch.zeros(len(ids), step + 1)
        x, turns = fast.language_model.embed_tokens.weight[tokens], fast.rotary(side.positions)
        for number in range(len(kept)):
            hears = kept[number][0].shape[2] > text_shown.shape[1] + step
            parts = [audio_shown, text_shown, added] if hears else [text_shown, added]
            x, kept[number] = fast.layer(
                number, x, side, turns, torch.cat(parts, 1)[:, None, None], kept[number]
            )
        x = rms_norm(x, fast.eps) * fast.language_model.norm.weight
    return answers


def shown(side: Side) -> Tensor:
    """What to add to scores (B, T): nought where a row has a token."""
    out = torch.full(side.shape, HIDDEN)
    out[side.rows, side.slots] = 0.0
    return out
