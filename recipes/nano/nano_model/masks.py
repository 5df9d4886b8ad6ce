"""Who looks at whom, by kind of token: two dimensions of each head, the rotary pair `KIND`, that hardly turn.

| kind of token | as a key, in self layers | as a query |
|---|---|---|
| transcript, opening quote | (0, 0) | (1, 0) |
| `assistant` | (0, -2) or further | (1, 0) |
| other text (HEADER as a key, OPEN as a query) | (-1, 0) | (0, 1) |
| audio | (-1, -1) | (0, -1) |
| `<|im_start|>`, the sink | (-1, -8) | (0, -1) |

in units of which two multiply to the margin. So a transcript looks at transcripts and `assistant`, other text at all
text but `assistant` (to which Whisper's heads turn where they find nothing), and audio and sinks at sinks alone, whose
values are nought: only layer 0, which numbers the clips, changes an audio token. In cross layers audio is (1, 0) as a
key, all text is (0, 0) and asks with (1, 0).
"""

from __future__ import annotations

import math

import torch

from .layout import AUDIO, AUDIO_NORMED, HEAD, HEADER, HEADS, KIND, OPEN, SINK, SINK_NORMED, START, Layer

SELF_MARGIN, CROSS_MARGIN = 20.0, 30.0
DEEP = 8.0  # of the sink: no content of an audio token makes up for it
FAR = 2.0  # of `assistant` for other text: Whisper's heads like it by up to 10
GATE_SHUT = -40.0  # the gates of audio and sinks: silu(-40) is nought


def kind_rows(head: int) -> tuple[int, int]:
    """The two rows of q and k that hold the kind."""
    return head * HEAD + KIND, head * HEAD + KIND + HEAD // 2


def unit(margin: float) -> float:
    """Of q and of k: two of them make a score of `margin`."""
    return math.sqrt(margin * math.sqrt(HEAD))


def mask_self(layer: Layer, mark_normed: float, start_normed: float) -> None:
    """Masks of a self-attention layer.

    Args:
        layer: changed in place.
        mark_normed: HEADER and OPEN after the layer's RMSNorm, for a token that has them.
        start_normed: START of `assistant` there, at the least.
    """
    u = unit(SELF_MARGIN)
    for first, second in map(kind_rows, range(HEADS)):
        _clear(layer, first, second)
        layer.bq[first] = u
        for flag, value in ((OPEN, mark_normed), (AUDIO, AUDIO_NORMED), (SINK, SINK_NORMED)):
            layer.q[first, flag] = -u / value
        layer.q[second, OPEN] = u / mark_normed
        layer.k[first, HEADER] = -u / mark_normed
        layer.k[second, START] = -FAR * u / start_normed
        _audio_and_sink(layer, first, second, u, key=-u)


def mask_cross(layer: Layer) -> None:
    """Masks of a cross-attention layer: text looks at audio alone (if there is any)."""
    u = unit(CROSS_MARGIN)
    for first, second in map(kind_rows, range(HEADS)):
        _clear(layer, first, second)
        layer.bq[first] = u
        for flag, value in ((AUDIO, AUDIO_NORMED), (SINK, SINK_NORMED)):
            layer.q[first, flag] = -u / value
        _audio_and_sink(layer, first, second, u, key=u)


def keep_audio(layer: Layer) -> None:
    """Audio and sinks pass the layer unchanged: the sink's value is nought, and their MLPs are shut."""
    layer.v[:, SINK] = -layer.bv / SINK_NORMED
    layer.gate[:, AUDIO], layer.gate[:, SINK] = GATE_SHUT / AUDIO_NORMED, GATE_SHUT / SINK_NORMED


def _audio_and_sink(layer: Layer, first: int, second: int, u: float, key: float) -> None:
    layer.q[second, AUDIO], layer.q[second, SINK] = -u / AUDIO_NORMED, -u / SINK_NORMED
    layer.k[first, AUDIO], layer.k[first, SINK] = key / AUDIO_NORMED, min(key, 0.0) / SINK_NORMED
    layer.k[second, AUDIO], layer.k[second, SINK] = -u / AUDIO_NORMED, -DEEP * u / SINK_NORMED


def _clear(layer: Layer, *rows: int) -> None:
    for row in rows:
        for matrix in (layer.q, layer.k):
            matrix[row] = torch.zeros_like(matrix[row])
        layer.bq[row] = layer.bk[row] = 0.0
