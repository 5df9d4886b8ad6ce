"""The language model: Qwen2 (arXiv 2407.10671), without its output layer.

Real tokens are packed: the tokens of all rows stand in one `(N, D)` matrix, so padding costs nothing, and a row's
result does not depend on what its neighbours are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audioflamingo.config import Qwen2Config
from audioflamingo.errors import ArgumentError, ContextLengthError
from audioflamingo.kernels import gpu
from audioflamingo.kernels.host import to_host
from audioflamingo.kernels.modules import Linear, check_autocast
from audioflamingo.network.adapters import routed_to
from audioflamingo.network.attention import AttentionImplementation, attend_packed
from audioflamingo.network.fused_step import run_step
from audioflamingo.network.kv import KVCache, KVView, PackedLayout
from audioflamingo.network.outputs import LanguageModelOutput

MLP_TOKENS = 4096  # that the feed-forward part takes at once outside of training


class Qwen2RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., D)` to `(..., D)` in the dtype of `x`; on a GPU in one kernel, which rounds once."""
        if x.is_cuda and x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotary_embedding(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions `(N,)`, each `(N, 1, E)`, computed in float32 (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # (N, E / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # (N, 1, E)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + E/2) of `(N, H, E)` by their positions' angles."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotate_both(query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys, which a captured step does at once."""
    if gpu.in_step(query) and query.shape[-1].bit_count() == 1:
        return gpu.rotate_both(query, key, rotary)
    return rotate(query, rotary), rotate(key, rotary)


class Qwen2Attention(nn.Module):
    """Causal grouped-query attention; biases on q, k and v only."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.implementation: AttentionImplementation = "sdpa"
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.num_key_value_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.num_key_value_heads * self.head_dim)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], view: KVView
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Maps packed tokens `(N, D)` to `(N, D)`, beside the weights of each row, `(1, H, T, L)`, if there are any."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, E)
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, E)
        query, key = rotate_both(query, key, rotary)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, E)
        keys, values = view.write(self.layer, key, value)  # (K, slots, E)
        out, weights = attend_packed(
            query,
            keys,
            values,
            view.layout,
            implementation=self.implementation,
            scale=self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o_proj(out.flatten(1)), weights


class Qwen2MLP(nn.Module):
    """SwiGLU feed-forward part, without biases."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps packed tokens `(N, D)` to `(N, D)`; of a long prompt some at a time, as `gate` is five times as wide."""
        if len(x) <= MLP_TOKENS or torch.is_grad_enabled():
            return self._run(x)
        out = torch.empty_like(x)
        for tokens in torch.arange(len(x)).split(MLP_TOKENS):
            part = slice(int(tokens[0]), int(tokens[-1]) + 1)
            with routed_to(tokens):
                out[part] = self._run(x[part])
        return out

    def _run(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gpu.silu_times(gate, up) if gpu.in_step(gate) else F.silu(gate) * up)


class Qwen2DecoderLayer(nn.Module):
    """Pre-norm layer: attention, then the feed-forward part."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Qwen2Attention(config, layer)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], view: KVView
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Maps packed tokens `(N, D)` to `(N, D)`, beside the attention weights."""
        attended, weights = self.self_attn(self.input_layernorm(x), rotary, view)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class Qwen2Model(nn.Module):
    """Token embeddings, layers and the final norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> LanguageModelOutput:
        """Runs the layers over new tokens.

        Args:
            inputs_embeds: `(B, S, D)`.
            attention_mask: `(B, S)`, or `(B, past + S)` of which the last S columns count: 0 marks padding, wherever
                it stands. None when every token is real.
            position_ids: `(B, S)`; by default real tokens are counted, those in the cache first.
            past_key_values: cache to read, append to and advance.
            output_hidden_states: also return the embeddings and the output of each layer.
            output_attentions: also return the attention weights; needs the `"eager"` implementation.

        Raises:
            ArgumentError: shapes that do not fit, or attention weights asked of `"sdpa"`.
            ContextLengthError: more tokens than `max_position_embeddings` or than the cache holds.
            DeviceError: a cache in one half precision under an autocast to the other, on a CPU.
        """
        if output_attentions:
            self._check_weights_exist()
        batch_size, num_columns, _ = inputs_embeds.shape
        index, num_new = _real_tokens(attention_mask, batch_size, num_columns, inputs_embeds.device)
        positions = None if position_ids is None else _pack_positions(position_ids, index, inputs_embeds)
        x = inputs_embeds.flatten(0, 1)
        x = x if index is None else x.index_select(0, index)  # (N, D)
        if past_key_values is None:
            self._check_context(num_new)
            view = KVView(None, PackedLayout.packed(num_new, x.device, positions))
        else:
            lengths = zip(
                past_key_values.lengths, num_new, strict=False
            )  # `view` refuses another number of rows
            self._check_context([past + new for past, new in lengths])
            check_autocast(x)
            view = past_key_values.view(num_new, x.device, positions)

        rotary = self._rotary(x, view.layout)
        hidden_states, attentions = [x], []
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, weights = checkpoint(layer, x, rotary, view, use_reentrant=False)
            else:
                x, weights = layer(x, rotary, view)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(_pad_weights(weights, index, view.layout, (batch_size, num_columns)))
        if past_key_values is not None:
            past_key_values.advance(num_new)
        x = hidden_states[-1] = self.norm(x)

        def unpack(packed: Tensor) -> Tensor:
            return _unpack(packed, index, batch_size, num_columns)

        return LanguageModelOutput(
            last_hidden_state=unpack(x),
            past_key_values=past_key_values,
            hidden_states=tuple(unpack(h) for h in hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def forward_packed(self, x: Tensor, view: KVView) -> Tensor:
        """Runs the layers over new tokens that are packed already, for a caller who batches rows of its own.

        The caller counts the new tokens in afterwards. Nothing is read from the device, and with a layout that keeps
        tensors only (`PackedLayout.of_step`) the call can be compiled or captured.

        Args:
            x: embeddings of the rows' new tokens, one row after the other, `(N, D)`.
            view: what the rows hold, and where the new tokens go.

        Returns:
            The normalised hidden states, `(N, D)`.

        Raises:
            ContextLengthError: as `forward`; not in a captured step, which knows no lengths.
            DeviceError: one half precision under an autocast to the other, on a CPU.
        """
        check_autocast(x)
        layout = view.layout
        if layout.num_new is not None and layout.num_past is not None:
            self._check_context(
                [past + new for past, new in zip(layout.num_past, layout.num_new, strict=True)]
            )
        rotary = self._rotary(x, layout)
        stepped = run_step(self.layers, x, rotary, view)
        if stepped is not None:
            return self.norm(stepped)
        for layer in self.layers:
            x, _ = layer(x, rotary, view)
        return self.norm(x)

    def _rotary(self, x: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        assert self.config.head_dim is not None
        return rotary_embedding(layout.positions, self.config.head_dim, self.config.rope_theta, x.dtype)

    def _check_context(self, lengths: list[int]) -> None:
        limit = self.config.max_position_embeddings
        if max(lengths) > limit:
            raise ContextLengthError(
                f"{max(lengths)} tokens are more than the model's context of {limit}; shorten the audio (25 tokens a "
                "second) or the conversation."
            )

    def _check_weights_exist(self) -> None:
        if any(
            module.implementation != "eager"
            for module in self.modules()
            if isinstance(module, Qwen2Attention)
        ):
            raise ArgumentError(
                "output_attentions needs attn_implementation='eager'; 'sdpa' never forms the weights."
            )


def _real_tokens(
    attention_mask: Tensor | None, batch_size: int, num_columns: int, device: torch.device
) -> tuple[Tensor | None, list[int]]:
    """Flat indices of the real tokens (None: all are real), and their number in each row."""
    if attention_mask is None:
        return None, [num_columns] * batch_size
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != batch_size
        or attention_mask.shape[1] < num_columns
    ):
        raise ArgumentError(
            f"attention_mask must be ({batch_size}, {num_columns}) or longer by the cached tokens, got "
            f"{tuple(attention_mask.shape)}."
        )
    mask = to_host(attention_mask[:, -num_columns:] != 0)
    num_new = [sum(row) for row in mask]
    if not all(num_new):
        raise ArgumentError(f"row {num_new.index(0)} of attention_mask marks no token as real.")
    if min(num_new) == num_columns:
        return None, num_new
    flat = [b * num_columns + s for b, row in enumerate(mask) for s, is_real in enumerate(row) if is_real]
    return torch.tensor(flat, device=device), num_new


def _pack_positions(position_ids: Tensor, index: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    if position_ids.shape[-1] != inputs_embeds.shape[1]:
        raise ArgumentError(
            f"position_ids must be {tuple(inputs_embeds.shape[:2])}, got {tuple(position_ids.shape)}."
        )
    flat = position_ids.expand(inputs_embeds.shape[:2]).flatten()
    return flat if index is None else flat.index_select(0, index)


def _unpack(packed: Tensor, index: Tensor | None, batch_size: int, num_columns: int) -> Tensor:
    """Packed `(N, D)` back to `(B, S, D)`, zeros in the padding."""
    if index is not None:
        empty = packed.new_zeros((batch_size * num_columns, packed.shape[-1]))
        packed = empty.index_copy(0, index.to(packed.device), packed)
    return packed.unflatten(0, (batch_size, num_columns))


def _pad_weights(
    weights: list[Tensor] | None, index: Tensor | None, layout: PackedLayout, shape: tuple[int, int]
) -> Tensor:
    """Attention weights of the rows as one `(B, H, S, L)` tensor.

    With padding in the input, L counts the columns of the input behind the longest past, as the mask does.
    """
    assert weights is not None
    assert layout.num_past is not None
    batch_size, num_columns = shape
    if index is None and len(set(layout.num_past)) == 1:
        return torch.cat(weights)
    longest_past = max(layout.num_past)
    flat = range(batch_size * num_columns) if index is None else to_host(index)
    columns: list[list[int]] = [[] for _ in range(batch_size)]
    for position in flat:
        columns[position // num_columns].append(position % num_columns)
    out = weights[0].new_zeros((batch_size, weights[0].shape[1], num_columns, longest_past + num_columns))
    for row, (part, past) in enumerate(zip(weights, layout.num_past, strict=True)):
        queries = torch.tensor(columns[row], device=part.device)
        keys = torch.cat([torch.arange(past, device=part.device), longest_past + queries])
        out[row, :, queries[:, None], keys] = part[0]
    return out
