"""One new token a row through all layers of the language model in one call of a compiled kernel, on a CPU.

Activations are float32 in it, whatever the model's dtype; weights are floats, halves, or the packed integers of a
quantized model. Layers one by one are the reference; of a small model half of a step is then what lies
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

DTYPES = (*INPUT_DTYPES, torch.float16)  # of a model, in the order of DType in kernels.h
HEAD_STEP = 64  # the dimensions of a head are a multiple of these, widths of `HALF_COLUMNS`

_FLOATS, _HALVES, _PACKED = range(3)  # the kinds of weights, as step.h numbers them
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def run_step(layers: Iterable[Any], x: Tensor, rotary: tuple[Tensor, Tensor], view: KVView) -> Tensor | None:
    """Runs the layers over one new token a row; the view is written.

    Args:
        layers: `Qwen2DecoderLayer`s.
        x: embeddings, float32, bfloat16 or float16 `(R, D)`.
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
        x.dtype not in DTYPES
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
        linears = _linears(layer)
        if linears is None:
            return None
        others = (*_others(layer, linears), store.keys[number], store.values[number])
        forms.add(_form(layer, linears, others, x.dtype))
        if None in forms or len(forms) > 1:
            return None
        tensors = (*(tensor for linear in linears for tensor in _stored(linear)), *others)
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


def _linears(layer: Any) -> list[Linear | QuantizedLinear] | None:
    """Those of a layer in the kernel's order; None if it is not the plain one. Runs in every step: kept cheap."""
    parts = layer._modules
    attention, mlp = parts["self_attn"], parts["mlp"]
    if layer.training or attention.implementation != "sdpa":
        return None
    linears = [attention._modules[name] for name in _ATTENTION] + [mlp._modules[name] for name in _MLP]
    for module in (layer, attention, mlp, *linears, *(parts[name] for name in _NORMS)):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
    are_plain = all(type(linear) in (Linear, QuantizedLinear) for linear in linears)
    has_others = any(linear._parameters.get("bias") is not None for linear in linears[3:])
    return linears if are_plain and not has_others else None


def _stored(linear: Linear | QuantizedLinear) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weights, scales and smoothing of a layer."""
    if type(linear) is QuantizedLinear:
        return linear.packed, linear.scales, linear.smoothing
    return linear._parameters["weight"], None, None


def _others(layer: Any, linears: list[Linear | QuantizedLinear]) -> list[Tensor | None]:
    """The biases and the norms' weights of a layer."""
    biases = [linear._parameters.get("bias") for linear in linears[:3]]
    return biases + [layer._modules[name]._parameters["weight"] for name in _NORMS]


def _form(
    layer: Any,
    linears: list[Linear | QuantizedLinear],
    others: tuple[Tensor | None, ...],
    dtype: torch.dtype,
) -> tuple[int, ...] | None:
    """Width, heads, key heads, head dimensions, the inner width, the kind of weights, their group and the dtype.

    None if the kernel does not take such tensors.
    """
    attention = layer._modules["self_attn"]
    heads, key_heads, head_dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    width, inner = linears[4].in_features, linears[4].out_features
    if width % HALF_COLUMNS or inner % HALF_COLUMNS or head_dim % HEAD_STEP:
        return None
    if None in others[-2:] or not all(_is_plain(tensor, dtype) for tensor in others):
        return None
    queries, keys = heads * head_dim, key_heads * head_dim
    shapes = [(queries, width), (keys, width), (keys, width), (width, queries)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    kinds = {_kind(linear, shape, dtype) for linear, shape in zip(linears, shapes, strict=True)}
    kind = kinds.pop()
    if kind is None or kinds:
        return None
    return width, heads, key_heads, head_dim, inner, *kind, DTYPES.index(dtype)


def _kind(
    linear: Linear | QuantizedLinear, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[int, int] | None:
    """The kind of a layer's weights, and their group if they are int4; None if the kernel does not take them."""
    weight, scales, smoothing = _stored(linear)
    if type(linear) is QuantizedLinear:
        is_plain = _is_plain(weight, torch.uint8) and _is_plain(scales, torch.float32)
        is_taken = is_plain and _is_plain(smoothing, dtype) and not linear.format.is_float
        return (_PACKED, linear.format.group or 0) if is_taken and linear.shape == shape else None
    if dtype == torch.bfloat16 or weight is None or weight.shape != shape:
        return None
    kind = _HALVES if torch.float16 in (weight.dtype, dtype) else _FLOATS
    return (kind, 0) if _is_plain(weight, (torch.float32, torch.float16)[kind]) else None


def _is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous())
