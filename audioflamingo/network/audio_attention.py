"""Where the language model looks in the audio while it writes: the attention of chosen layers, formed beside a run.

The run itself is the network's own; of the chosen layers queries and keys are formed once more, and only the weights
that are asked for. Nothing is switched, so other threads may run the model meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from audioflamingo.network.kv import KVView
from audioflamingo.network.qwen2 import Qwen2Model, rotary_embedding, rotate
from audioflamingo.network.row_layout import PackedLayout


@torch.no_grad()
def audio_attention(
    language_model: Qwen2Model, x: Tensor, audio: slice, first_query: int, layers: Collection[int]
) -> Iterator[tuple[int, Tensor]]:
    """Runs one prompt with its answer, as far as the last layer that is asked for.

    Args:
        language_model: runs; attention is taken from it.
        x: embeddings, `(N, D)`.
        audio: positions of the audio tokens.
        first_query: position of the first token whose look is wanted; all behind it are.
        layers: which.

    Yields:
        A layer and its weights, float32 `(H, T, A)`, of T tokens over the A audio tokens alone: they sum to 1.
    """
    layout = PackedLayout.packed([len(x)], x.device)
    view = KVView(None, layout)
    config = language_model.config
    assert config.head_dim is not None
    rotary = rotary_embedding(layout.positions, config.head_dim, config.rope_theta, x.dtype)
    for number in range(max(layers) + 1):
        layer: Any = language_model.layers[number]
        if number in layers:
            attention, norm = layer.self_attn, layer.input_layernorm
            h = norm(x.to(norm.weight.device))
            turn = rotary[0].to(h.device), rotary[1].to(h.device)
            query, key = (
                rotate(project(h).unflatten(-1, (-1, config.head_dim)), turn)
                for project in (attention.q_proj, attention.k_proj)
            )  # (N, H, E), (N, K, E)
            groups = query.shape[1] // key.shape[1]
            keys = key[audio].repeat_interleave(groups, dim=1).float()
            scores = torch.einsum("thd,ahd->hta", query[first_query:].float(), keys)
            yield number, (scores * config.head_dim**-0.5).softmax(-1)
        x, _ = layer(x, rotary, view)
