"""SwiGLU in place of Whisper's GELU: its strongest neurons, then a fit on the states of real text.

gelu(z) is nearly silu(1.702 z) / 1.702, so a neuron's gate takes Whisper's first matrix and its `up` a constant. What
the neurons left out add on average is written by one more, which is always open.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import CONST, INNER, STATE, WIDTH, Layer, rms_norm
from .whisper import DecoderLayer

STEEPNESS = 1.702
OPEN_GATE = 3.0  # of the neuron that writes the mean
BATCH, PEAK_RATE, WARM_STEPS = 1024, 1e-3, 20


def put_neurons(layer: Layer, whisper: DecoderLayer, before: Tensor, const: float) -> None:
    """Sets the MLP to Whisper's INNER - 1 strongest neurons.

    Args:
        layer: changed in place.
        whisper: the layer that it replaces.
        before: states that enter it, (N, STATE).
        const: the flag CONST beside them.
    """
    gain, bias = whisper.norms[2]
    inner = F.gelu(F.layer_norm(before, (STATE,), gain, bias) @ whisper.fc1.T + whisper.bias1)
    strength = inner.pow(2).mean(0).sqrt() * whisper.fc2.norm(dim=0)
    top = strength.topk(INNER - 1).indices
    scale = math.sqrt(STATE / WIDTH)
    const_normed = const / float(before.pow(2).mean(1).sqrt().median()) * scale
    mean = inner.mean(0)
    rest = whisper.bias2 + whisper.fc2 @ mean - whisper.fc2[:, top] @ mean[top]
    layer.gate[:-1, :STATE] = STEEPNESS * scale * (whisper.fc1 * gain)[top]
    layer.gate[:-1, CONST] = STEEPNESS * (whisper.bias1 + whisper.fc1 @ bias)[top] / const_normed
    layer.up[:-1, CONST] = 1 / (STEEPNESS * const_normed)
    layer.down[:STATE, :-1] = (whisper.fc2 - whisper.fc2.mean(0))[:, top]
    layer.gate[-1, CONST], layer.up[-1, CONST] = OPEN_GATE / const_normed, 1 / const_normed
    layer.down[:STATE, -1] = (rest - rest.mean()) / float(F.silu(torch.tensor(OPEN_GATE)))


def output(layer: Layer, normed: Tensor) -> Tensor:
    """What the MLP adds, (N, WIDTH), from its normed inputs (N, WIDTH)."""
    return (F.silu(normed @ layer.gate.T) * (normed @ layer.up.T)) @ layer.down.T


def fit(layer: Layer, before: Tensor, after: Tensor, const: float, seconds: float) -> float:
    """Fits the MLP to states before and after Whisper's, (N, STATE) each; returns the relative error at the end."""
    x, target = torch.zeros(len(before), WIDTH), torch.zeros(len(before), WIDTH)
    x[:, :STATE], x[:, CONST], target[:, :STATE] = before, const, after - before
    energy = target.pow(2).sum(1, keepdim=True)
    weight = 1 / (energy + 0.3 * energy.median())
    x = rms_norm(x)
    parts = [getattr(layer, name).requires_grad_() for name in ("gate", "up", "down")]
    optimizer, start, step, loss = (
        torch.optim.Adam(parts, betas=(0.9, 0.98)),
        time.time(),
        0,
        torch.tensor(0.0),
    )
    while (done := (time.time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / WARM_STEPS) * (1 - done) + 1e-6
        rows = torch.randint(len(x), (BATCH,))
        loss = ((output(layer, x[rows]) - target[rows]).pow(2).sum(1, keepdim=True) * weight[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    for name, part in zip(("gate", "up", "down"), parts, strict=True):
        setattr(layer, name, part.detach())
    return loss.item()
