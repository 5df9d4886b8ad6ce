"""One new token a row through all layers of the language model in one call of a compiled kernel, on a CPU in float32.

Layers one by one are as good and the reference; of a small model half of a step is then what lies between their
products. A layer that is not as `Qwen2DecoderLayer` makes it, an adapter's or one with a hook, takes them all there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from audioflamingo.kernels import native
from audioflamingo.kernels.modules import Linear
from audioflamingo.network.kv import KVView

if TYPE_CHECKING:
    from audioflamingo.network.qwen2 import Qwen2DecoderLayer

MAX_ROWS = 16
WIDTH_STEP, HEAD_STEP = 32, 64  # widths and the dimensions of a head are multiples of these

Rotary = tuple[Tensor, Tensor]


def run_step(layers: Iterable[Any], x: Tensor, rotary: Rotary, view: KVView) -> Tensor | None:
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
        or len(x) > MAX_ROWS
        or torch.is_grad_enabled()
        or not native.has_step()
    ):
        return None
    pointers: list[int] = []
    sizes: tuple[int, ...] | None = None
    for number, layer in enumerate(layers):
        tensors = _tensors(layer)
        buffers = store.keys[number], store.values[number]
        if tensors is None or not all(map(_is_plain, (*tensors, *buffers))):
            return None
        found = _sizes(layer, tensors)
        if found is None or found != (sizes or found):
            return None
        sizes = found
        pointers += [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, *buffers)]
    if sizes is None:
        return None
    out = x.clone(memory_format=torch.contiguous_format)
    native.step(
        torch.get_num_threads(),
        (len(pointers) // native.STEP_POINTERS, len(x), *sizes),
        layer.input_layernorm.eps,
        store.num_slots * sizes[3],
        pointers,
        tuple(t.data_ptr() for t in (layout.slots, layout.starts, layout.ends, *rotary, out)),
    )
    return out


def _tensors(layer: Qwen2DecoderLayer) -> tuple[Tensor | None, ...] | None:
    """Those of a layer in the kernel's order; None if it is not the plain one."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )
    if any(type(linear) is not Linear for linear in linears) or attention.implementation != "sdpa":
        return None
    norms = layer.input_layernorm, layer.post_attention_layernorm
    if any(_has_hooks(module) for module in (layer, attention, mlp, *linears, *norms)) or layer.training:
        return None
    if any(linear.bias is not None for linear in linears[3:]) or norms[0].eps != norms[1].eps:
        return None
    biases = (linear.bias for linear in linears[:3])
    return (*(linear.weight for linear in linears), *biases, *(norm.weight for norm in norms))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous())


def _sizes(layer: Qwen2DecoderLayer, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...] | None:
    """Width, heads, key heads, dimensions of a head and the inner width; None if the kernel does not take them."""
    attention = layer.self_attn
    heads, key_heads, head_dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    gate = tensors[4]
    assert gate is not None
    inner, width = gate.shape
    if width % WIDTH_STEP or inner % WIDTH_STEP or head_dim % HEAD_STEP:
        return None
    outputs = (heads, key_heads, key_heads)
    expected = [(n * head_dim, width) for n in outputs]
    expected += [(width, heads * head_dim), (inner, width), (inner, width), (width, inner)]
    shapes = [tuple(t.shape) for t in tensors[:7] if t is not None]
    return (width, heads, key_heads, head_dim, inner) if shapes == expected else None
