"""Which clip of a conversation an audio token belongs to: nothing in the text between two clips says where one ends.

Whisper's encoder adds positions to its frames, so the first token of a clip (of each window of 30 s) can be told from
all others by one direction. The projector marks it with BEGIN. In layer 0 one head has each audio token look at the
beginnings so far and at `system`, with equal scores: of n + 1 equal shares n are beginnings, and that share, in CLIP,
is the clip's number. It is nought in the first clip, so a conversation of one clip is heard as if there were no
numbers. The cross heads of questions that look near prefer the last clip by it, those that look far the first. The
keys of two more heads tell the clips: which one they look for, as an answer names the first and then the second, is
learned (without such keys it cannot be: of two matrices that are both nought none has a gradient).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .answers import FAR_HEADS, NEAR_HEADS
from .layout import (
    AUDIO,
    AUDIO_FLAG,
    AUDIO_RMS,
    BEGIN,
    CLIP,
    HEAD,
    OPEN,
    STATE,
    SYSTEM,
    WIDTH,
    Layer,
)
from .masks import kind_rows

BEGIN_SIZE, CLIP_SIZE = 1.0, 6.0
SURE = (0.42, 0.56)  # of the direction: below it no beginning, above it one
STEEP = 60.0
ROUNDS, RIDGE, BEGIN_WEIGHT = 6, 1e-3, 5.0  # of the fit
COUNTING_HEAD, PAIR, SCORE = 0, 30, 13.0  # in layer 0; a score that ten minutes of audio do not outweigh
NAMING_HEADS, NAMING_PAIR = (0, 2), 3  # of cross layers; a rotary pair that hardly turns
PREFERENCE, QUERY_SIZE = (
    6.0,
    2.0,
)  # score between the first clip and the second; a small query, for the sinks' sake


def fit_direction(beginnings: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """What is about 1 for the first rows of clips and 0 for others: weight (D,) and bias.

    Least squares, in which a row may be further on its own side than asked.

    Args:
        beginnings, others: rows of the encoder, (N, D) and (M, D).
    """
    x = torch.cat([beginnings, others]).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    is_first = torch.arange(len(x)) < len(beginnings)
    weighted = x * torch.where(is_first, BEGIN_WEIGHT, 1.0)[:, None].double()
    inverse = torch.linalg.inv(weighted.T @ x + RIDGE * torch.eye(x.shape[1]))
    target = is_first.double()
    for _ in range(ROUNDS):
        direction = inverse @ (weighted.T @ target)
        found = x @ direction
        target = torch.where(is_first, found.clamp(min=1), found.clamp(max=0))
    return direction[:-1].float(), float(direction[-1])


def mark_beginnings(projector: dict[str, Tensor], direction: Tensor, bias: float) -> None:
    """Has a projector's spare neurons write BEGIN, and -CLIP_SIZE / 2 into CLIP. Changed in place."""
    first, bias1, second, bias2 = (
        projector[f"linear_{name}"] for name in ("1.weight", "1.bias", "2.weight", "2.bias")
    )
    for number, (threshold, sign) in enumerate(zip(SURE, (1, -1), strict=True)):
        first[STATE + number], bias1[STATE + number] = STEEP * direction, STEEP * (bias - threshold)
        second[BEGIN, STATE + number] = sign * BEGIN_SIZE / (STEEP * (SURE[1] - SURE[0]))
    bias2[CLIP] = -CLIP_SIZE / 2


def number_code(count: Tensor) -> Tensor:
    """What layer 0 adds to CLIP of a token behind so many beginnings, its own clip's included."""
    return CLIP_SIZE * count / (count + 1)


def count_clips(layer: Layer, system_normed: float) -> None:
    """The head of layer 0. `system_normed`: SYSTEM of `system` after RMSNorm."""
    row, (_, second) = COUNTING_HEAD * HEAD + PAIR, kind_rows(COUNTING_HEAD)
    energy = STATE + AUDIO_FLAG**2 + CLIP_SIZE**2 / 4
    audio_normed = AUDIO_FLAG / math.sqrt(energy / WIDTH)
    begin_normed = BEGIN_SIZE / math.sqrt((energy + BEGIN_SIZE**2) / WIDTH)
    size = math.sqrt(SCORE * math.sqrt(HEAD))
    layer.q[second, AUDIO] = 0  # no sinks
    layer.q[row, AUDIO] = size / audio_normed
    layer.k[row, SYSTEM], layer.k[row, BEGIN] = size / system_normed, size / begin_normed
    value = COUNTING_HEAD * HEAD + 1
    layer.v[value, BEGIN] = 1 / begin_normed
    layer.o[CLIP, value] = CLIP_SIZE


def prefer_clips(layer: Layer, mark_normed: float) -> None:
    """Has the near heads of a cross layer look at the last clip and the far ones at the first, for OPEN queries, and
    two more at whichever clip a query learns to ask for."""
    step = float(number_code(torch.tensor(2.0)) - number_code(torch.tensor(1.0))) / AUDIO_RMS
    size = PREFERENCE * math.sqrt(HEAD) / QUERY_SIZE / step
    for sign, heads in ((1, NEAR_HEADS), (-1, FAR_HEADS)):
        for head in heads:
            row = kind_rows(head)[1]
            layer.q[row, OPEN], layer.k[row, CLIP] = QUERY_SIZE / mark_normed, sign * size
    for head in NAMING_HEADS:
        layer.k[head * HEAD + NAMING_PAIR, CLIP] = size
