"""Weights made even for quantization: factors between neighbours, which change nothing in float.

A flag decides alone: the column of a gate that shuts it for audio is a hundred times as large as what the gate
computes, and a row of a matrix in int8, or a group in int4, has one scale, so that such a column leaves the others a
few steps. But what writes a channel (a norm's gain, the values of attention, the neurons of an MLP) can multiply it by
what the columns that read it are divided by. The flags of audio and sinks before an MLP may grow as they like, since
nothing comes of them there; the flag of `assistant`, which vanishes beside its long state, is made as large as the
others; the other factors are the usual compromise between largest inputs and largest weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layout import AUDIO, SINK, START

POWERS = (0.0, 0.25, 0.5, 0.75)  # of the largest input; the rest is the largest weight's
SHUT_FACTOR = 64.0  # of the flags of audio and sinks before MLPs; float16 bears it
MOST = 8  # of the factors' exponents
LARGEST = 2.0**13  # of what neurons may become: float16 ends at 2 ** 16, and other inputs may give more
TOKENS = 4000  # that factors are chosen by


@dataclass(frozen=True)
class Channel:
    """Channels between what writes and what reads them.

    Attributes:
        name: for the report.
        written: tensors whose first dimension are the channels.
        readers: matrices whose inputs are the channels.
        is_shut: nothing comes of audio and sinks behind it.
        is_masked: it is read by queries and keys, which tell kinds of tokens apart.
        writer: the matrix whose outputs grow with the factors.
    """

    name: str
    written: list[Tensor]
    readers: list[nn.Linear]
    is_shut: bool = False
    is_masked: bool = False
    writer: nn.Linear | None = None

    @torch.no_grad()
    def multiply(self, factors: Tensor) -> None:
        """Makes the channels larger and their readers' columns smaller."""
        for tensor in self.written:
            tensor.mul_(factors if tensor.ndim == 1 else factors[:, None])
        for reader in self.readers:
            reader.weight.div_(factors)


def equalize(model: Any, inputs: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Chooses factors for all channels of the language model, those with the least errors of int8 products.

    Args:
        model: float32; changed in place, its answers stay.
        inputs: of `model(...)`: some conversations of all kinds.

    Returns:
        Relative squared error before and after, by the channels' name.
    """
    seen, largest = _inputs_of(model, inputs)
    report = {}
    for channels in _channels(model):
        x = seen[channels.name]
        if channels.is_shut:
            x = x[(x[:, AUDIO].abs() < 1e-3) & (x[:, SINK].abs() < 1e-3)]
        tried = [torch.ones(x.shape[1]), *(_factors(x, channels.readers, power) for power in POWERS)]
        if channels.is_shut:
            for factors in tried[1:]:
                factors[[AUDIO, SINK]] = SHUT_FACTOR
        if channels.is_masked:
            for factors in tried:
                factors[START] = _start_factor(channels.readers)
        if channels.writer is not None:
            tried = [_bounded(factors, largest[channels.name]) for factors in tried]
        errors = [_error(x * factors, channels.readers, factors) for factors in tried]
        least = min(range(len(tried)), key=errors.__getitem__)
        channels.multiply(tried[least])
        report[channels.name] = (errors[0], errors[least])
    return report


def _channels(model: Any) -> Iterator[Channel]:
    """Of all layers but the first, which is never quantized."""
    language_model = model.model.language_model
    for number, layer in enumerate(language_model.layers[1:], start=1):
        heads, mlp = layer.self_attn, layer.mlp
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        yield Channel(
            f"{number}.attention",
            [norms[0]],
            [heads.q_proj, heads.k_proj, heads.v_proj],
            is_masked=True,
        )
        yield Channel(f"{number}.values", [heads.v_proj.weight, heads.v_proj.bias], [heads.o_proj])
        yield Channel(f"{number}.mlp", [norms[1]], [mlp.gate_proj, mlp.up_proj], is_shut=True)
        yield Channel(f"{number}.neurons", [mlp.up_proj.weight], [mlp.down_proj], writer=mlp.up_proj)
    yield Channel("output", [language_model.norm.weight], [model.lm_head])


def _inputs_of(model: Any, inputs: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the readers of each channel get (N, D), and the largest that the channels' writers give (D,)."""
    seen: dict[str, list[Tensor]] = {}
    largest: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, args: seen.setdefault(name, []).append(args[0].flatten(0, -2).float())

    def measure(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Tensor) -> None:
            most = output.flatten(0, -2).abs().amax(0)
            largest[name] = torch.maximum(largest.get(name, most), most)

        return hook

    hooks = []
    for channels in _channels(model):
        hooks.append(channels.readers[0].register_forward_pre_hook(keep(channels.name)))
        if channels.writer is not None:
            hooks.append(channels.writer.register_forward_hook(measure(channels.name)))
    with torch.inference_mode():
        for each in inputs:
            model(**each)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    tokens = {name: torch.cat(parts) for name, parts in seen.items()}
    chosen = {name: x[torch.randperm(len(x), generator=generator)[:TOKENS]] for name, x in tokens.items()}
    return chosen, largest


def _factors(x: Tensor, readers: Sequence[nn.Linear], power: float) -> Tensor:
    """Of the channels (D,): powers of two, which round as before in every dtype."""
    largest_input = x.abs().amax(0).clamp(min=1e-4)
    weights = torch.cat([reader.weight.detach().abs() for reader in readers])
    typical = weights.median(1, keepdim=True).values.clamp(min=1e-6)
    largest_weight = (weights / typical).quantile(0.9, 0).clamp(min=1e-3)
    factors = largest_weight ** (1 - power) / largest_input**power
    return torch.exp2((factors / factors.median()).log2().round().clamp(-MOST, MOST))


def _bounded(factors: Tensor, largest: Tensor) -> Tensor:
    """No larger than brings outputs (D,) to `LARGEST`; those that are larger stay as they are."""
    bound = torch.exp2((LARGEST / largest.clamp(min=1e-6)).log2().floor()).clamp(min=1.0)
    return torch.minimum(factors, bound)


def _start_factor(readers: Sequence[nn.Linear]) -> float:
    """Brings the largest weight of START down to those of the other flags."""
    largest = torch.cat([reader.weight.detach().abs() for reader in readers]).amax(0)
    ratio = largest[START] / largest[[AUDIO, SINK]].max().clamp(min=1e-3)
    return float(torch.exp2(ratio.clamp(min=1.0).log2().round()))


def _error(x: Tensor, readers: Sequence[nn.Linear], factors: Tensor) -> float:
    """Relative squared error of int8 products of inputs (N, D) with columns divided by factors."""
    errors = []
    for reader in readers:
        weight = reader.weight.detach() / factors
        wanted = x @ weight.T
        error = (_rounded(x) @ _rounded(weight).T - wanted).pow(2).mean(0)
        errors.append((error / wanted.var(0).clamp(min=1e-6)).clamp(max=1e3).mean())
    return float(torch.stack(errors).mean())


def _rounded(x: Tensor) -> Tensor:
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scales).round() * scales
