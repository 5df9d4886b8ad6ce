"""What is trained, how fast, and what stays as it was constructed.

The stream of Whisper's first layers is small, so a step of what writes into it (o, down) is large: these learn at a
tenth of the rate. Masks, flags, layer 0 and the embeddings, which are Whisper's, are exact parts and stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..layout import ANSWER, AUDIO, CLIP, CODES, HEADER, HEADS, OPEN, SINK, SINK_NORMED, STATE, WIDTH
from ..masks import kind_rows

FACTORS = (  # the first pattern that a parameter's name matches decides; 0 is frozen
    (r"layers\.0\.|layernorm|audio_tower|multi_modal_projector|embed_tokens", 0.0),
    (r"layers\.[1357]\.mlp\.(gate|up)", 4.0),
    (r"layers\.1\.mlp\.down", 0.2),
    (r"layers\.3\.mlp\.down", 0.3),
    (r"layers\.5\.mlp\.down", 0.7),
    (r"layers\.7\.mlp\.down", 1.0),
    (r"\.(q|k|v)_proj|mlp\.(gate|up)", 1.0),
    (r"o_proj|down_proj", 0.1),
    (r"lm_head", 0.7),
    (r"norm\.weight", 0.1),
)
OF_ANSWERS = re.compile(r"layers\.[1357]\.mlp")  # which transcripts do not open
TURNED = re.compile(r"layers\.[1357]\.mlp\.(gate|up)_proj|self_attn\.[qkv]_proj\.weight")  # see `optimizer`
SELF_ATTENTION = re.compile(r"layers\.[1357]\.self_attn")
MARKS = [HEADER, OPEN, ANSWER, CLIP]  # of what is no transcript, and of clips behind the first
FLAG_ROWS = list(range(STATE, CODES[0]))  # of what writes into the stream


def factor_of(name: str, factors: tuple[tuple[str, float], ...] = FACTORS) -> float:
    """Share of the learning rate that a parameter gets."""
    return next(factor for pattern, factor in factors if re.search(pattern, name))


def parameter_groups(model: Any, factors: tuple[tuple[str, float], ...] = FACTORS) -> list[dict[str, Any]]:
    """Optimizer groups with their `factor`, and whether steps are `turned`; everything else is frozen."""
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = factor_of(name, factors)
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            groups.setdefault((factor, bool(TURNED.search(name))), []).append(parameter)
    return [
        {"params": members, "factor": factor, "turned": is_turned}
        for (factor, is_turned), members in groups.items()
    ]


def keep_exact_gradients(model: Any) -> None:
    """Sets the gradients of masks and flags to nought."""
    kinds = [row for head in range(HEADS) for row in kind_rows(head)]
    for layer in model.model.language_model.layers[1:]:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            if projection.weight.grad is not None:
                projection.weight.grad[kinds], projection.bias.grad[kinds] = 0, 0
        for matrix in (attention.o_proj, layer.mlp.down_proj):
            if matrix.weight.grad is not None:
                matrix.weight.grad[FLAG_ROWS] = 0
        if layer.mlp.gate_proj.weight.grad is not None:
            layer.mlp.gate_proj.weight.grad[:, [AUDIO, SINK]] = 0


@torch.no_grad()
def keep_sinks_silent(model: Any) -> None:
    """The value of a sink is nought, whatever the bias of the values has become."""
    for layer in model.model.language_model.layers[1:]:
        value = layer.self_attn.v_proj
        value.weight[:, SINK] = -value.bias / SINK_NORMED


class SharedWeights:
    """What transcripts use, too: it takes a share of each step, so that answers are learned and hearing stays.

    Answers alone use the MLPs of self layers, and the columns of all matrices that read the marks of other text.

    Args:
        model: `parameter_groups` has said what is trained.
        share: of a step; 1 holds nothing back.
        self_share: the same for self-attention, by which an answer reads the question; as `share` if it is None.
    """

    def __init__(self, model: Any, share: float, self_share: float | None = None) -> None:
        self.rates: list[tuple[torch.nn.Parameter, Tensor]] = []
        own = share if self_share is None else self_share
        if share == own == 1:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not OF_ANSWERS.search(name):
                rates = torch.full_like(parameter, own if SELF_ATTENTION.search(name) else share)
                if parameter.ndim == 2 and parameter.shape[1] == WIDTH:
                    rates[:, MARKS] = 1.0
                self.rates.append((parameter, rates))

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """An optimizer's step, of which they take their share."""
        before = [parameter.detach().clone() for parameter, _ in self.rates]
        yield
        with torch.no_grad():
            for (parameter, rates), old in zip(self.rates, before, strict=True):
                parameter.sub_(old).mul_(rates).add_(old)
