"""A shipped model as training wants it: what shipping moved between neighbours is moved back, and no answer changes."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..layout import EPS


@torch.no_grad()
def make_plain(model: Any) -> None:
    """Puts the gains of norms into the matrices behind them, and gives the stream its constructed size.

    Learning rates go by that size. A model that was constructed and not shipped stays as it is.
    """
    text, config = model.model.language_model, model.config.text_config
    for layer in text.layers:
        heads, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, heads.q_proj, heads.k_proj, heads.v_proj)
        _fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    _fold(text.norm, model.lm_head)
    factor = math.sqrt(config.rms_norm_eps / EPS)
    last = model.model.multi_modal_projector.linear_2
    writers = [text.embed_tokens.weight, last.weight, last.bias]
    for layer in text.layers:
        writers += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    for tensor in writers:
        tensor.div_(factor)
    config.rms_norm_eps = EPS


def _fold(norm: Any, *readers: Any) -> None:
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)
