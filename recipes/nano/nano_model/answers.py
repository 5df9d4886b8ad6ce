"""What other tasks than transcription start from: a mild bias, for OPEN tokens only, that training can turn into skill.

Whisper's part of the model does not change for transcripts. Tokens that are OPEN (questions, and the first tokens of an
answer) get two heads that look at the token before and at the tokens around, which gives words an order; cross heads
that tell near from far, which tells clips apart; and neurons in the MLPs of self layers, which Whisper leaves free.
"""

from __future__ import annotations

import math

import torch

from .layout import AUDIO, AUDIO_NORMED, CONST, HEAD, HEADER, INNER, OPEN, THETA, WIDTH, Layer

BEFORE_HEAD, AROUND_HEAD = 5, 4
LOOKING = {
    BEFORE_HEAD: ((0, 6.0, 1.0), (1, 30.0, 1.0)),
    AROUND_HEAD: ((1, 20.0, 3.0),),
}  # pair, score, distance
DISTANCE_PAIR = 2  # turns by half a circle in 400 tokens: 16 s of audio
NEAR_HEADS, FAR_HEADS = (1, 3), (4, 5)  # of cross layers
DISTANCE_SCORE = 4.0
SHUT = 16.0  # of the gates, for what is not OPEN


def order_words(layer: Layer, mark_normed: float) -> None:
    """Heads of a self layer that look at the text just before, for OPEN queries and HEADER keys."""
    for head, terms in LOOKING.items():
        for pair, score, distance in terms:
            size = math.sqrt(score * math.sqrt(HEAD)) / mark_normed
            angle = distance * turn(pair)
            first, second = head * HEAD + pair, head * HEAD + HEAD // 2 + pair
            layer.q[first, OPEN], layer.q[second, OPEN] = size * math.cos(angle), -size * math.sin(angle)
            layer.k[first, HEADER] = size


def order_clips(layer: Layer, mark_normed: float) -> None:
    """Heads of a cross layer that look at the audio just before, and others that look away from it, for OPEN queries.

    Training makes states longer, and so flags weaker: what is written here falls to a third in the late layers.
    """
    size = math.sqrt(DISTANCE_SCORE * math.sqrt(HEAD))
    for sign, heads in ((1, NEAR_HEADS), (-1, FAR_HEADS)):
        for head in heads:
            row = head * HEAD + DISTANCE_PAIR
            layer.q[row, OPEN], layer.k[row, AUDIO] = sign * size / mark_normed, size / AUDIO_NORMED


def free_neurons(layer: Layer, mark_normed: float, const_normed: float) -> None:
    """An MLP that writes nothing yet, and is shut but for OPEN tokens."""
    size = 1 / math.sqrt(WIDTH)
    layer.gate, layer.up = size * torch.randn(INNER, WIDTH), size * torch.randn(INNER, WIDTH)
    layer.down = torch.zeros(WIDTH, INNER)
    layer.gate[:, CONST] = -SHUT / const_normed
    layer.gate[:, OPEN] = SHUT / mark_normed


def turn(pair: int) -> float:
    """Radians a token of a rotary pair."""
    return THETA ** (-2 * pair / HEAD)
