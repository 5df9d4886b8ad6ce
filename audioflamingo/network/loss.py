"""The loss of the language model, and what the reference's loss makes of left padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import ArgumentError
from audioflamingo.kernels.host import to_host
from audioflamingo.network.qwen2 import Qwen2DecoderLayer, Qwen2Model

LOSS_CHUNK = 1024  # labelled positions whose logits exist at one time


def causal_lm_loss(
    hidden: Tensor, labels: Tensor, lm_head: nn.Module, row_weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of predicting each label from the position before it, in float32.

    Logits exist for `LOSS_CHUNK` labelled positions at a time, in the backward pass too.

    Args:
        hidden: `(B, S, D)`.
        labels: `(B, S)`, -100 where nothing is to be predicted.
        lm_head: maps `(N, D)` to `(N, V)`.
        row_weights: `(B,)`, how much each label of a row counts in the mean; equally by default.

    Raises:
        ArgumentError: labels of another shape, or none that counts.
    """
    if labels.shape != hidden.shape[:2]:
        raise ArgumentError(
            f"labels must be {tuple(hidden.shape[:2])} as the input, got {tuple(labels.shape)}."
        )
    targets = labels[:, 1:].flatten().to(hidden.device)
    counted = [i for i, label in enumerate(to_host(targets)) if label != IGNORED_LABEL]
    if not counted:
        raise ArgumentError(
            "labels are -100 everywhere (the first column never counts); there is nothing to learn from."
        )
    index = torch.tensor(counted, device=hidden.device)
    weights = torch.ones(len(counted), device=hidden.device)
    if row_weights is not None:
        weights = row_weights.to(hidden.device, torch.float32)[index // (hidden.shape[1] - 1)]
    hidden, targets = hidden[:, :-1].flatten(0, 1).index_select(0, index), targets.index_select(0, index)

    def chunk_loss(hidden_chunk: Tensor, target_chunk: Tensor, weight_chunk: Tensor) -> Tensor:
        losses = F.cross_entropy(lm_head(hidden_chunk).float(), target_chunk, reduction="none")
        return (losses * weight_chunk).sum()

    chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), weights.split(LOSS_CHUNK), strict=True)
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum() / weights.sum()


def reference_padding_states(
    language_model: Qwen2Model, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> Tensor:
    """Gives padding that stands right before a labelled token the hidden state that the reference has there.

    With left padding each row's first token is a label (unless it is masked), predicted from the padding before it.
    That teaches nothing, but the published loss counts it. Pad right, or label the answer only, to avoid it. To the
    reference, padding is a token that attends to nothing.

    Args:
        language_model: computes the states.
        hidden: `(B, S, D)`, zeros in the padding.
        input_ids: `(B, S)`.
        attention_mask: `(B, S)`, or longer by the cached tokens.
        labels: `(B, S)`.

    Returns:
        `(B, S, D)`.
    """
    if labels.shape != hidden.shape[:2]:
        return hidden  # which the loss refuses
    num_columns = hidden.shape[1]
    is_real = attention_mask[:, -num_columns:].to(labels.device) != 0
    starts = is_real[:, :-1].logical_not() & is_real[:, 1:]
    before_label = starts & (labels[:, 1:] != IGNORED_LABEL)
    flat = [
        row * num_columns + column
        for row, columns in enumerate(to_host(before_label))
        for column, is_wanted in enumerate(columns)
        if is_wanted
    ]
    if not flat:
        return hidden
    index = torch.tensor(flat, device=hidden.device)
    x = language_model.embed_tokens(input_ids.flatten()[index.to(input_ids.device)])  # (N, D)
    for layer in language_model.layers:
        assert isinstance(layer, Qwen2DecoderLayer)
        change = layer.mlp(layer.post_attention_layernorm(x))
        x = x.to(change.device) + change  # a split model's layer brings its input to its own device
    filled = language_model.norm(x).to(hidden.device, hidden.dtype)
    return hidden.flatten(0, 1).index_copy(0, index, filled).view_as(hidden)
