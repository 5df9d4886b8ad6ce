"""Which dimension holds what, in the stream of the language model and in the heads of its attention.

The stream's first 384 dimensions hold the state of Whisper's decoder, centred, so that RMSNorm acts as its LayerNorm
does; the other 32 hold flags. Of a head's 32 rotary pairs four turn (by 1, 0.088, 0.0077 and 0.00068 a token), the
others stand still for all distances that occur: those carry content, and the last says who may look at whom.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATE, WIDTH = 384, 416  # Whisper's width; the stream's
HEADS, HEAD, INNER = 6, 64, 1024
NUM_LAYERS = 9  # positions; then self-attention and cross-attention of each of Whisper's four layers
THETA = 10 ** (38 * 32 / 36)  # rotary base: pair i turns by THETA ** (-i / 32) a token

# Flags: every text token; audio; <|im_start|>; tokens that a transcript does not look at; the opening and the closing
# quote; `assistant`; tokens that look at everything; the first tokens of an answer.
CONST, AUDIO, SINK, HEADER, QUOTE, CLOSE, START, OPEN, ANSWER = range(STATE, STATE + 9)
CODES = range(STATE + 9, STATE + 15)  # what the heads of layer 0 found, for its own MLP
# The first token of a clip; the clip's number; the token `system` (see `counting`).
BEGIN, CLIP, SYSTEM = range(STATE + 15, STATE + 18)

TURNING = (0, 1, 2, 3)  # rotary pairs
KIND = 31  # the pair of the masks
CONTENT = [
    *range(3, KIND),
    *range(HEAD // 2 + 3, HEAD // 2 + KIND),
]  # 56 dimensions of a head, still or nearly

FLAG = 1311 / 2**15  # of the embeddings: twice the size of the state there, and exact in float16
MARK = (
    0.6  # of HEADER, OPEN and ANSWER, written by layer 0: stays visible beside the states of the last layers
)
AUDIO_FLAG, SINK_SIZE = 2.0, 64.0
EPS = 1e-6  # of the norms
AUDIO_RMS = ((STATE + AUDIO_FLAG**2) / WIDTH) ** 0.5  # of an audio token
SINK_NORMED = WIDTH**0.5  # the sink's flag after RMSNorm
AUDIO_NORMED = AUDIO_FLAG / AUDIO_RMS

# What is shipped: the flags in the embeddings, which count positions, become 0.5, which float8 holds exactly. With the
# flag of `assistant` off by 2e-4 that token gets a fifth of a mark, and no transcript has a word.
STREAM_FACTOR = 0.5 / FLAG
FLOAT8_MOST, TINY = 240.0, 1e-6  # of a matrix in float8, which ends at 448


def float8_factor(weight: Tensor) -> Tensor:
    """The power of two that brings the largest value near the end of what float8 (E4M3) holds."""
    return torch.exp2((FLOAT8_MOST / weight.abs().amax().clamp(min=TINY)).log2().floor())


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """RMSNorm without gain over the last dimension, as the model computes it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centred(x: Tensor) -> Tensor:
    """Minus the mean over the last dimension: what LayerNorm takes off anyway."""
    return x - x.mean(-1, keepdim=True)


class Layer:
    """Matrices of one decoder layer, all zero at first.

    Attributes:
        q, k, v: (HEADS * HEAD, WIDTH) with biases bq, bk, bv.
        o: (WIDTH, HEADS * HEAD).
        gate, up: (INNER, WIDTH); down: (WIDTH, INNER).
    """

    def __init__(self) -> None:
        inner = HEADS * HEAD
        self.q, self.k, self.v = (torch.zeros(inner, WIDTH) for _ in range(3))
        self.bq, self.bk, self.bv = (torch.zeros(inner) for _ in range(3))
        self.o = torch.zeros(WIDTH, inner)
        self.gate, self.up = torch.zeros(INNER, WIDTH), torch.zeros(INNER, WIDTH)
        self.down = torch.zeros(WIDTH, INNER)

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a checkpoint gives them inside a layer."""
        named = {f"self_attn.{part}_proj.weight": getattr(self, part) for part in "qkvo"}
        named |= {f"self_attn.{part}_proj.bias": getattr(self, f"b{part}") for part in "qkv"}
        named |= {f"mlp.{part}_proj.weight": getattr(self, part) for part in ("gate", "up", "down")}
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return named | {name: torch.ones(WIDTH) for name in norms}
