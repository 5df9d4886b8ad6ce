"""One new token a row through all layers of the language model in one call of a compiled kernel, on a CPU in float32.

Layers one by one are as good and the reference; of a small model half of a step is then what lies between their
products. A layer that is not as `Qwen2DecoderLayer` makes it, an adapter's or one with a hook, takes them all there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from audioflamingo.kernels import native
from audioflamingo.kernels.linear import HALF_COLUMNS, MAX_BF16_ROWS
from audioflamingo.kernels.modules import Linear
from audioflamingo.network.kv import KVView

HEAD_STEP = 64  # the dimensions of a head are a multiple of these, widths of `HALF_COLUMNS`

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def run_step(layers: Iterable[Any], x: Tensor, rotary: tuple[Tensor, Tensor], view: KVView) -> Tensor | None:
    """Runs the layers over one new token a row; the view is written.

    Args:
        layers: `Qwen2DecoderLayer`s.
        x: embeddings, float32 `(R, D)`.
        rotary: cosines and sines of the tokens' positions, each `(R, 1, E)`.
        view: what the rows hold, and where the new tokens go.

    Returns:
        What the last layer gives, `(R, D)`; None where this is no work for the kernel, and nothing was done.

    Raises:
        MemoryError: no memory to work in.
    """
    layout, store = view.layout, view.store
    if (
        x.dtype != torch.float32
        or not x.is_cpu
        or store is None
        or layout.num_new is None
        or len(layout.num_new) != len(x)
        or len(x) > MAX_BF16_ROWS
        or torch.is_grad_enabled()
        or not native.has_step()
    ):
        return None
    pointers: list[int] = []
    forms: set[Any] = set()
    for number, layer in enumerate(layers):
        tensors = _tensors(layer)
        if tensors is None:
            return None
        buffers = store.keys[number], store.values[number]
        forms.add(_form(layer, tensors, buffers))
        if None in forms or len(forms) > 1:
            return None
        pointers += [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, *buffers)]
    if not forms:
        return None
    is_half, *sizes = forms.pop()
    out = x.clone(memory_format=torch.contiguous_format)
    native.step(
        torch.get_num_threads(),
        (len(pointers) // native.STEP_POINTERS, len(x), *sizes),
        is_half,
        layer.input_layernorm.eps,
        store.num_slots * sizes[3],
        pointers,
        tuple(t.data_ptr() for t in (layout.slots, layout.starts, layout.ends, *rotary, out)),
    )
    return out


def _tensors(layer: Any) -> tuple[Tensor | None, ...] | None:
    """Those of a layer in the kernel's order; None if it is not the plain one. Runs in every step: kept cheap."""
    parts = layer._modules
    attention, mlp = parts["self_attn"], parts["mlp"]
    assert attention is not None
    assert mlp is not None
    linears = [attention._modules[name] for name in _ATTENTION] + [mlp._modules[name] for name in _MLP]
    norms = [parts[name] for name in _NORMS]
    if layer.training or attention.implementation != "sdpa":
        return None
    for module in (layer, attention, mlp, *linears, *norms):
        if (
            module is None
            or module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in module.__dict__
        ):
            return None
    weights, biases = [], []
    for linear in linears:
        if type(linear) is not Linear:
            return None
        weights.append(linear._parameters["weight"])
        biases.append(linear._parameters["bias"])
    if any(bias is not None for bias in biases[3:]):
        return None
    return (*weights, *biases[:3], *(norm._parameters["weight"] for norm in norms if norm is not None))


def _form(
    layer: Any, tensors: tuple[Tensor | None, ...], buffers: tuple[Tensor | None, ...]
) -> tuple[Any, ...] | None:
    """Whether the weights are float16; width, heads, key heads, head dimensions and the inner width.

    None if the kernel does not take such tensors.
    """
    attention = layer.self_attn
    heads, key_heads, head_dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    weights = tensors[:7]
    assert weights[4] is not None
    inner, width = weights[4].shape
    if width % HALF_COLUMNS or inner % HALF_COLUMNS or head_dim % HEAD_STEP:
        return None
    dtype, queries, keys = weights[4].dtype, heads * head_dim, key_heads * head_dim
    expected = (
        (queries, width),
        (keys, width),
        (keys, width),
        (width, queries),
        *[(inner, width)] * 2,
        (width, inner),
    )
    if any(weight is None or weight.shape != shape for weight, shape in zip(weights, expected, strict=True)):
        return None
    if dtype not in (torch.float32, torch.float16) or not all(_is_plain(weight, dtype) for weight in weights):
        return None
    if None in buffers or not all(_is_plain(tensor, torch.float32) for tensor in (*tensors[7:], *buffers)):
        return None
    return dtype == torch.float16, width, heads, key_heads, head_dim, inner


def _is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous())
