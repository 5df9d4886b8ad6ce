"""Whisper tiny.en's decoder, as named matrices, and its states on given text: what the construction starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import HEADS, STATE, centred

START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # tokens of the English models
NUM_LAYERS = 4
Norm = tuple[Tensor, Tensor]  # gain, bias


@dataclass(frozen=True)
class Attention:
    """Projections of one attention: weights (STATE, STATE), biases (STATE,); Whisper's keys have no bias."""

    q: Tensor
    bq: Tensor
    k: Tensor
    v: Tensor
    bv: Tensor
    o: Tensor
    bo: Tensor


@dataclass(frozen=True)
class DecoderLayer:
    """Self-attention, cross-attention and MLP (`fc1` (4 * STATE, STATE), `fc2` back), each behind its LayerNorm."""

    attention: Attention
    cross: Attention
    fc1: Tensor
    bias1: Tensor
    fc2: Tensor
    bias2: Tensor
    norms: tuple[Norm, Norm, Norm]


class Whisper:
    """The decoder.

    Args:
        arrays: of CTranslate2's model file, float32, by name.
        tokenizer: the content of tokenizer.json.

    Attributes:
        embeddings, output: (V, STATE); positions: (448, STATE).
        layers: four.
        norm, encoder_norm: the last LayerNorms of decoder and encoder.
    """

    def __init__(self, arrays: dict[str, Tensor], tokenizer: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.embeddings = arrays["decoder/embeddings/weight"]
        self.output = arrays.get("decoder/projection/weight", self.embeddings)
        self.positions = arrays["decoder/position_encodings/encodings"]
        self.norm, self.encoder_norm = _norm(arrays, "decoder"), _norm(arrays, "encoder")
        self.layers = [_layer(arrays, f"decoder/layer_{number}/") for number in range(NUM_LAYERS)]

    def states(self, tokens: Tensor, frames: Tensor) -> list[Tensor]:
        """Centred states (T, STATE) before each attention and MLP, and at the end: 13 of them.

        Args:
            tokens: (T,), START and NO_TIMESTAMPS first.
            frames: the encoder's rows without gain and bias of its last LayerNorm, (A, STATE).
        """
        gain, bias = self.encoder_norm
        heard = frames * gain + bias
        x = self.embeddings[tokens] + self.positions[: len(tokens)]
        states = [x]
        for layer in self.layers:
            normed = _normed(x, layer.norms[0])
            x = x + attend(layer.attention, normed, normed, is_causal=True)
            states.append(x)
            x = x + attend(layer.cross, _normed(x, layer.norms[1]), heard)
            states.append(x)
            x = x + mlp(layer, x)
            states.append(x)
        return [centred(state) for state in states]


def attend(part: Attention, queries: Tensor, keys: Tensor, is_causal: bool = False) -> Tensor:
    """One attention, from queries (T, STATE) to keys (L, STATE)."""
    q, k, v = queries @ part.q.T + part.bq, keys @ part.k.T, keys @ part.v.T + part.bv
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out.transpose(0, 1).flatten(1) @ part.o.T + part.bo


def mlp(layer: DecoderLayer, x: Tensor) -> Tensor:
    """What the MLP adds to states (T, STATE)."""
    return F.gelu(_normed(x, layer.norms[2]) @ layer.fc1.T + layer.bias1) @ layer.fc2.T + layer.bias2


def stack(states: Iterable[list[Tensor]]) -> list[Tensor]:
    """The states of several texts together."""
    return [torch.cat(parts) for parts in zip(*states, strict=True)]


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, (STATE,), *norm, 1e-5)


def _norm(arrays: dict[str, Tensor], place: str) -> Norm:
    return arrays[f"{place}/layer_norm/gamma"], arrays[f"{place}/layer_norm/beta"]


def _layer(arrays: dict[str, Tensor], place: str) -> DecoderLayer:
    def linear(name: str) -> tuple[Tensor, Tensor]:
        return arrays[f"{place}{name}/weight"], arrays[f"{place}{name}/bias"]

    joined, joined_bias = linear("self_attention/linear_0")
    (q, k, v), (bq, _, bv) = joined.split(STATE), joined_bias.split(STATE)
    self_attention = Attention(q, bq, k, v, bv, *linear("self_attention/linear_1"))
    joined, joined_bias = linear("attention/linear_1")
    (k, v), (_, bv) = joined.split(STATE), joined_bias.split(STATE)
    cross = Attention(*linear("attention/linear_0"), k, v, bv, *linear("attention/linear_2"))
    norms = tuple(_norm(arrays, place + name) for name in ("self_attention", "attention", "ffn"))
    return DecoderLayer(self_attention, cross, *linear("ffn/linear_0"), *linear("ffn/linear_1"), norms)  # type: ignore[arg-type]
