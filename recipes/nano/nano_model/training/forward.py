"""The built-in model's loss, computed for text tokens only.

Layer 0 gives an audio token the number of its clip (`nano_model.counting`), no other layer changes it
(`nano_model.masks`). So training needs of the audio its keys and values in the cross-attention layers, which follow
from the projector's rows at once. Everything else equals the model's own forward pass within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from audioflamingo.training.batches import Batch

from ..counting import COUNTING_HEAD
from ..layout import CLIP, STATE, STREAM_FACTOR, float8_factor, rms_norm
from . import lengths
from .teacher import SHARE, Soft

Keys = tuple[Tensor, Tensor]  # and values, (B, H, L, E) each
DOWN_FACTOR = STREAM_FACTOR / 16  # what writes into the stream is stored larger; powers of two do not matter
HIDDEN = -1e4  # added to the scores of keys that a query cannot see


@dataclass(frozen=True)
class Side:
    """Tokens of one kind, text or audio, out of rows of a batch.

    Attributes:
        rows: row of each token (N,).
        slots: its number among the row's tokens of this kind (N,).
        positions: its number among all tokens of the row (N,).
        shape: rows, and the most tokens of this kind that one has.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, is_member: Tensor) -> Side:
        """From a mask (B, S)."""
        rows, positions = is_member.nonzero(as_tuple=True)
        slots = (is_member.cumsum(1) - 1)[rows, positions]
        return cls(rows, slots, positions, (len(is_member), int(is_member.sum(1).max()) if len(rows) else 0))

    def spread(self, x: Tensor, heads: int) -> Tensor:
        """Packed (N, H * E) to (B, H, T, E), zeros where a row has no more tokens."""
        out = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1])
        out = out.index_copy(0, self.rows * self.shape[1] + self.slots, x)
        return out.view(*self.shape, heads, -1).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """Back: (B, H, T, E) to (N, H * E)."""
        flat = x.transpose(1, 2).reshape(self.shape[0] * self.shape[1], -1)
        return flat[self.rows * self.shape[1] + self.slots]

    def grid(self) -> Tensor:
        """Positions (B, T); where a row has no more tokens, a position behind all others."""
        out = torch.full(self.shape, 1 << 30)
        out[self.rows, self.slots] = self.positions
        return out


@dataclass(frozen=True)
class Text:
    """The text tokens of a batch, of which those of an opening that all rows share are computed once.

    Attributes:
        side: all text tokens (N,).
        first: those that are computed (U,), as numbers among all.
        copies: which of these each token equals (N,).
    """

    side: Side
    first: Tensor
    copies: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, is_text: Tensor) -> Text:
        """From ids and a mask (B, S)."""
        side = Side.of(is_text)
        alike = (is_text & (input_ids == input_ids[:1])).all(0)
        opening = int(alike.long().cumprod(0).sum())
        computed = (side.rows == 0) | (side.positions >= opening)
        copies = torch.where(computed, computed.cumsum(0) - 1, side.positions)
        return cls(side, computed.nonzero()[:, 0], copies)

    def spread(self, x: Tensor, heads: int) -> Tensor:
        """Computed tokens (U, H * E) to (B, H, T, E)."""
        return self.side.spread(x.index_select(0, self.copies), heads)

    def gather(self, x: Tensor) -> Tensor:
        """Back: (B, H, T, E) to (U, H * E)."""
        return self.side.gather(x).index_select(0, self.first)


def visible(queries: Side, keys: Side) -> Tensor:
    """What to add to scores (B, 1, T, L): nought where the key is not after the query."""
    later = keys.grid()[:, None, :] > queries.grid()[:, :, None]
    return torch.zeros(later.shape).masked_fill_(later, HIDDEN)[:, None]


def rounded(x: Tensor, noise: float) -> Tensor:
    """Noise as rounding to 8 bits would make it (`noise` 1), for weights that bear quantization."""
    if not noise:
        return x
    step = x.detach().abs().amax(-1, keepdim=True) * (noise / 127)
    return x + (torch.rand_like(x) - 0.5) * step


def project(layer: Any, part: str, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """The q, k or v projection of a layer, or those of its rows that make some heads."""
    projection = getattr(layer.self_attn, f"{part}_proj")
    return F.linear(x, projection.weight[rows], projection.bias[rows])


def taught(losses: Tensor, logits: Tensor, soft: Soft) -> Tensor:
    """Losses (M,) with those against a teacher mixed in where there is one; logits (M, V)."""
    places = soft.is_taught.nonzero()[:, 0]
    if not len(places):
        return losses
    chosen = logits[places]
    expected = chosen.gather(1, soft.tokens[places]) - chosen.logsumexp(1, keepdim=True)
    against = -(soft.shares[places] * expected).sum(1)
    return losses.index_add(0, places, SHARE * (against - losses[places]))


def in_float8(weight: Tensor, stream: float = 1.0) -> Tensor:
    """A matrix as float8 (E4M3) will hold it; gradients pass. `stream`: what it is multiplied by before."""
    with torch.no_grad():
        factor = float8_factor(weight) * stream
        error = (weight * factor).to(torch.float8_e4m3fn).float() / factor - weight
    return weight + error


class FastModel:
    """Forward pass of an AF3 model of the built-in kind.

    Args:
        model: its parameters are used in place.
        cross: numbers of the layers whose text looks at audio.
        noise: of rounding, on the inputs of the matrices.
        is_float8: the MLPs but layer 0's are rounded to float8, as they will be stored.
    """

    def __init__(
        self, model: Any, cross: tuple[int, ...] = (2, 4, 6, 8), noise: float = 0.0, is_float8: bool = False
    ) -> None:
        self.model, self.cross, self.noise, self.is_float8 = model, cross, noise, is_float8
        self.language_model = model.model.language_model
        text = model.config.text_config
        self.heads, self.head, self.eps = text.num_attention_heads, text.head_dim, text.rms_norm_eps
        theta = float(text.rope_theta)
        self.frequencies = 1.0 / theta ** (torch.arange(0, self.head, 2, dtype=torch.float32) / self.head)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, 1, E) at the positions of tokens."""
        angles = positions[:, None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Turns packed heads (N, H * E)."""
        x = x.unflatten(-1, (-1, self.head))
        first, second = x.chunk(2, -1)
        return (x * rotary[0] + torch.cat([-second, first], -1) * rotary[1]).flatten(1)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        audio_rows: Tensor | None,
        keep: list[Keys] | None = None,
        excesses: list[Tensor] | None = None,
        gains: Tensor | None = None,
    ) -> tuple[Tensor, Side]:
        """States (N, D) of the text tokens behind the last norm, and where these tokens are.

        Args:
            input_ids, attention_mask: (B, S).
            audio_rows: the encoder's rows of all audio tokens in order, (A, D_audio).
            keep: gets each layer's keys and values, for `Answering`.
            excesses: gets how far states are too long behind each layer but the first (see `lengths`).
            gains: factors of the audio's channels by row (B, STATE), see `dropout`.
        """
        is_audio = (input_ids == self.model.config.audio_token_id) & attention_mask.bool()
        text, audio = Text.of(input_ids, attention_mask.bool() & ~is_audio), Side.of(is_audio)
        side = text.side
        ids = input_ids[side.rows, side.positions][text.first]
        x = self.language_model.embed_tokens.weight.index_select(0, ids)
        turns, masks = self.rotary(side.positions[text.first]), {False: visible(side, side)}
        heard = None
        if audio_rows is not None and len(audio.rows):
            heard = self.model.model.multi_modal_projector(audio_rows.to(x.dtype))
            turned = self.rotary(audio.positions)
            heard[:, CLIP] += self.numbers(heard, audio, turned, x, text, turns)
            heard = rms_norm(heard, self.eps)
            if gains is not None:
                heard = torch.cat([heard[:, :STATE] * gains[audio.rows], heard[:, STATE:]], 1)
            masks[True] = torch.cat([visible(side, audio), masks[False]], -1)
        for number, layer in enumerate(self.language_model.layers):
            before = None
            if number in self.cross and heard is not None:
                read = heard * layer.input_layernorm.weight
                before = (
                    audio.spread(self.rotate(project(layer, "k", read), turned), self.heads),
                    audio.spread(project(layer, "v", read), self.heads),
                )
            x, keys = self.layer(number, x, text, turns, masks[before is not None], before)
            if keep is not None:
                keep.append(keys)
            if excesses is not None and number:
                excesses.append(lengths.excess(x, number))
        normed = rms_norm(x, self.eps) * self.language_model.norm.weight
        return normed.index_select(0, text.copies), side

    @torch.no_grad()
    def numbers(
        self,
        heard: Tensor,
        audio: Side,
        turned: tuple[Tensor, Tensor],
        x: Tensor,
        text: Text,
        turns: tuple[Tensor, Tensor],
    ) -> Tensor:
        """What layer 0 adds to CLIP of audio tokens (A,): the number of their clip, by its counting head alone.

        Args:
            heard, audio, turned: the projector's rows (A, D), their places and rotary.
            x, text, turns: the same of text, (U, D).
        """
        layer, rows = (
            self.language_model.layers[0],
            slice(COUNTING_HEAD * self.head, (COUNTING_HEAD + 1) * self.head),
        )
        gain = layer.input_layernorm.weight
        own, other = rms_norm(heard, self.eps) * gain, rms_norm(x, self.eps) * gain
        query = audio.spread(self.rotate(project(layer, "q", own, rows), turned), 1)
        keys = (
            text.spread(self.rotate(project(layer, "k", other, rows), turns), 1),
            audio.spread(self.rotate(project(layer, "k", own, rows), turned), 1),
        )
        values = (
            text.spread(project(layer, "v", other, rows), 1),
            audio.spread(project(layer, "v", own, rows), 1),
        )
        mask = torch.cat([visible(audio, text.side), visible(audio, audio)], -1)
        shares = F.scaled_dot_product_attention(
            query, torch.cat(keys, 2), torch.cat(values, 2), mask.to(query.dtype)
        )
        return audio.gather(shares) @ layer.self_attn.o_proj.weight[CLIP, rows]

    def layer(
        self,
        number: int,
        x: Tensor,
        text: Text | Side,
        turns: tuple[Tensor, Tensor],
        mask: Tensor,
        before: Keys | None,
    ) -> tuple[Tensor, Keys]:
        """One layer on text tokens (U, D).

        Args:
            number: of the layer.
            x, text: the tokens' states and places.
            turns: from `rotary`.
            mask: added to the scores, (B, 1, T, L).
            before: keys and values in front of the tokens' own, (B, H, L', E).

        Returns:
            The states behind the layer, and all keys and values.
        """
        if (
            number == 0 and torch.is_grad_enabled()
        ):  # frozen: what it adds depends on kinds and places of tokens only
            with torch.no_grad():
                added, keys = self.layer(0, x.detach(), text, turns, mask, before)
                added = added - x
            return x + added, keys
        layer, noise = self.language_model.layers[number], self.noise if number else 0.0
        normed = rounded(rms_norm(x, self.eps) * layer.input_layernorm.weight, noise)
        query = text.spread(self.rotate(project(layer, "q", normed), turns), self.heads)
        key = text.spread(self.rotate(project(layer, "k", normed), turns), self.heads)
        value = text.spread(project(layer, "v", normed), self.heads)
        if before is not None:
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        out = F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype))
        x = x + F.linear(rounded(text.gather(out), noise), layer.self_attn.o_proj.weight)
        normed = rounded(rms_norm(x, self.eps) * layer.post_attention_layernorm.weight, noise)
        gate, up, down = (self.mlp_weight(number, part) for part in ("gate", "up", "down"))
        inner = F.silu(F.linear(normed, gate)) * F.linear(normed, up)
        return x + F.linear(rounded(inner, noise), down), (key, value)

    def mlp_weight(self, number: int, part: str) -> Tensor:
        """A matrix of a layer's MLP as the model will be stored."""
        weight: Tensor = getattr(self.language_model.layers[number].mlp, f"{part}_proj").weight
        if not number or not self.is_float8:
            return weight
        return in_float8(weight, DOWN_FACTOR if part == "down" else 1.0)

    def logits(
        self, batch: Batch, excesses: list[Tensor] | None = None, gains: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (M, V) before the labelled tokens, these labels (M,), and their rows (M,)."""
        assert batch.input_ids is not None
        assert batch.attention_mask is not None
        assert batch.labels is not None
        states, text = self.hidden(
            batch.input_ids, batch.attention_mask, batch.audio_rows, excesses=excesses, gains=gains
        )
        labels = batch.labels
        has_next = text.positions + 1 < labels.shape[1]
        wanted = torch.full_like(text.rows, -100)
        wanted[has_next] = labels[text.rows[has_next], text.positions[has_next] + 1]
        chosen = wanted != -100
        return self.model.lm_head(states[chosen]), wanted[chosen], text.rows[chosen]

    def loss(
        self,
        batch: Batch,
        smoothing: float = 0.0,
        teach: Callable[[Tensor, Tensor], Soft] | None = None,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
        gains: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy by weight and a charge for states that are too long, and figures of the batch.

        Args:
            batch: with labels.
            smoothing: of the labels.
            teach: what a teacher expects, by labels and their rows.
            weigh: weights of labels beside those of their rows, by labels and their rows.
            gains: factors of the audio's channels by row, see `dropout`.
        """
        excesses: list[Tensor] = []
        logits, labels, rows = self.logits(batch, excesses, gains)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if teach is not None:
            losses = taught(losses, logits, teach(labels, rows))
        assert batch.answer_weights is not None
        weights = batch.answer_weights[rows]
        if weigh is not None:
            weights = weights * weigh(labels, rows)
        right = (logits.detach().argmax(-1) == labels).float()
        loss = (losses * weights).sum() / weights.sum()
        too_long = lengths.WEIGHT * torch.stack(excesses).sum()
        figures = {"loss": loss, "too_long": too_long, "right": right.mean()}
        return loss + too_long, {name: float(value.detach()) for name, value in figures.items()} | {
            "labels": len(labels)
        }
