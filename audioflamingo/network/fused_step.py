"""One new token a row through all layers of the language model in one call of a compiled kernel, on a CPU.

Activations are float32 in it, whatever the model's dtype; weights are floats, halves, or the packed integers of a
quantized model. Layers one by one are as good and the reference; of a small model half of a step is then what lies
between their products. A layer that is not as `Qwen2DecoderLayer` makes it, an adapter's or one with a hook, takes them
all there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from audioflamingo.kernels import native
from audioflamingo.kernels.linear import HALF_COLUMNS, INPUT_DTYPES, MAX_BF16_ROWS
from audioflamingo.kernels.modules import Linear
from audioflamingo.network.kv import KVView
from audioflamingo.quantization.layers import QuantizedLinear

HEAD_STEP = 64  # the dimensions of a head are a multiple of these, widths of `HALF_COLUMNS`

_FLOATS, _HALVES, _PACKED = range(3)  # the kinds of weights, as step.h numbers them
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def run_step(layers: Iterable[Any], x: Tensor, rotary: tuple[Tensor, Tensor], view: KVView) -> Tensor | None:
    """Runs the layers over one new token a row; the view is written.

    Args:
        layers: `Qwen2DecoderLayer`s.
        x: embeddings, float32 or bfloat16 `(R, D)`.
        rotary: cosines and sines of the tokens' positions, each `(R, 1, E)`.
        view: what the rows hold, and where the new tokens go.

    Returns:
        What the last layer gives, `(R, D)` of the dtype of `x`; None where this is no work for the kernel, and nothing
        was done.

    Raises:
        MemoryError: no memory to work in.
    """
    layout, store = view.layout, view.store
    if (
        x.dtype not in INPUT_DTYPES
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
        tensors = (*tensors, store.keys[number], store.values[number])
        forms.add(_form(layer, tensors, x.dtype))
        if None in forms or len(forms) > 1:
            return None
        pointers += [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if not forms:
        return None
    sizes = forms.pop()
    out = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    turns = [turn.float() for turn in rotary]
    native.step(
        torch.get_num_threads(),
        (len(pointers) // native.STEP_POINTERS, len(x), *sizes),
        layer.input_layernorm.eps,
        store.num_slots * layer.self_attn.head_dim,
        pointers,
        tuple(t.data_ptr() for t in (layout.slots, layout.starts, layout.ends, *turns, out)),
    )
    return out.to(x.dtype)


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
    weights: list[Tensor | None] = []
    for linear in linears:
        if type(linear) is Linear:
            weights += [linear._parameters["weight"], None, None]
        elif type(linear) is QuantizedLinear:
            weights += [linear.packed, linear.scales, linear.smoothing]
        else:
            return None
    biases = [linear.bias for linear in linears]
    if any(bias is not None for bias in biases[3:]):
        return None
    return (*weights, *biases[:3], *(norm._parameters["weight"] for norm in norms if norm is not None))


def _form(layer: Any, tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[int, ...] | None:
    """Width, heads, key heads, head dimensions, the inner width, the kind of weights, their group and the dtype.

    None if the kernel does not take such tensors.
    """
    attention, mlp = layer.self_attn, layer.mlp
    heads, key_heads, head_dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    gate = mlp.gate_proj
    width, inner = gate.in_features, gate.out_features
    if width % HALF_COLUMNS or inner % HALF_COLUMNS or head_dim % HEAD_STEP:
        return None
    queries, keys = heads * head_dim, key_heads * head_dim
    expected = [(queries, width), (keys, width), (keys, width), (width, queries)]
    expected += [(inner, width), (inner, width), (width, inner)]
    linears = [getattr(attention, name) for name in _ATTENTION] + [getattr(mlp, name) for name in _MLP]
    kinds = {_kind(linear, shape, dtype) for linear, shape in zip(linears, expected, strict=True)}
    if None in kinds or len(kinds) > 1:
        return None
    smoothing, others = tensors[2 : 3 * len(linears) : 3], tensors[3 * len(linears) :]
    if None in others[-2:] or not all(_is_plain(tensor, dtype) for tensor in (*smoothing, *others)):
        return None
    kind, group = kinds.pop() or (0, 0)
    return width, heads, key_heads, head_dim, inner, kind, group, INPUT_DTYPES.index(dtype)


def _kind(
    linear: Linear | QuantizedLinear, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[int, int] | None:
    """The kind of a layer's weights, and their group if they are int4; None if the kernel does not take them."""
    if type(linear) is QuantizedLinear:
        is_plain = _is_plain(linear.packed, torch.uint8) and _is_plain(linear.scales, torch.float32)
        is_plain = is_plain and not linear.format.is_float
        return (_PACKED, linear.format.group or 0) if is_plain and linear.shape == shape else None
    weight = linear._parameters["weight"]
    if dtype != torch.float32 or weight is None or weight.shape != shape:
        return None
    kind = _HALVES if weight.dtype == torch.float16 else _FLOATS
    return (kind, 0) if _is_plain(weight, (torch.float32, torch.float16)[kind]) else None


def _is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous())
