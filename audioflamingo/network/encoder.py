"""The audio encoder: Whisper's, then average pooling and a LayerNorm (arXiv 2507.08128, section 3.1; 2212.04356).

Windows are packed: only frames that can reach a valid output are computed, the positions of all windows stand in one
`(P, D)` matrix, and all windows attend in one call where a kernel takes them, else those of equal length. That is
exact: masked keys never counted, and rows past a window's audio tokens are dropped by the model anyway.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audioflamingo.audio.loading import conv_length, num_audio_tokens
from audioflamingo.config import AudioFlamingo3EncoderConfig
from audioflamingo.errors import ArgumentError
from audioflamingo.kernels.host import to_device, to_host
from audioflamingo.kernels.modules import Conv1d, Linear, check_autocast
from audioflamingo.network.attention import (
    AttentionImplementation,
    attend,
    attend_any_lengths,
    takes_any_lengths,
)
from audioflamingo.network.outputs import EncoderOutput
from audioflamingo.network.row_layout import Bounds

POOL = 2
FLOAT16_LIMIT = torch.finfo(torch.float16).max - 1000


@dataclass(frozen=True)
class WindowGroup:
    """Windows of equal length that stand side by side in the packed matrix: `num_windows * length` rows."""

    num_windows: int
    length: int


class AudioFlamingo3Attention(nn.Module):
    """Bidirectional self-attention within each window; `k_proj` has no bias."""

    def __init__(self, config: AudioFlamingo3EncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.dropout = config.attention_dropout
        self.implementation: AttentionImplementation = "sdpa"
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of packed positions `(P, D)`, each `(P, D)`."""
        return self.k_proj(x), self.v_proj(x)

    def forward(
        self,
        x: Tensor,
        groups: list[WindowGroup],
        keys_values: tuple[Tensor, Tensor] | None = None,
        bounds: Bounds | None = None,
    ) -> Tensor:
        """Attends from packed positions, `(Q, D)` to `(Q, D)`.

        Args:
            x: where from: all positions of all groups, or some positions of one window.
            groups: how the P positions are windows.
            keys_values: of all positions, each `(P, D)`; those of `x` by default.
            bounds: the windows for a single call of attention, where `x` is all positions.
        """
        # The query is scaled before the product, as the weights were trained: in half precision the order matters.
        query = self.q_proj(x) * self.head_dim**-0.5
        key, value = self.keys_values(x) if keys_values is None else keys_values
        heads = (-1, self.num_heads, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        packed = query.view(heads), key.view(heads), value.view(heads)
        if bounds is not None and takes_any_lengths(
            *packed, self.implementation, dropout, bounds, is_causal=False
        ):
            return self.out_proj(attend_any_lengths(*packed, bounds, scale=1.0, is_causal=False).flatten(1))
        sizes = [group.num_windows * group.length for group in groups]
        queries = query.split(sizes) if len(groups) > 1 else [query]
        outputs = []
        for group, q, k, v in zip(groups, queries, key.split(sizes), value.split(sizes), strict=True):
            shape = (group.num_windows, -1, self.num_heads, self.head_dim)
            out, _ = attend(
                q.view(shape).transpose(1, 2),
                k.view(shape).transpose(1, 2),
                v.view(shape).transpose(1, 2),
                implementation=self.implementation,
                scale=1.0,
                dropout=dropout,
            )  # (n, H, T, E)
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        return self.out_proj(torch.cat(outputs))


class AudioFlamingo3EncoderLayer(nn.Module):
    """Pre-LN transformer layer: attention, then an MLP with exact GELU."""

    def __init__(self, config: AudioFlamingo3EncoderConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.self_attn = AudioFlamingo3Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, groups: list[WindowGroup], bounds: Bounds | None = None) -> Tensor:
        """Maps packed positions `(P, D)` to `(P, D)`."""
        return self._finish(x, self.self_attn(self.self_attn_layer_norm(x), groups, bounds=bounds))

    def in_pieces(self, x: Tensor, num_positions: int) -> Generator[None, None, Tensor]:
        """`forward` of one window `(T, D)`, so many positions at a time; yields before each piece."""
        normed = self.self_attn_layer_norm(x)
        keys_values, groups = self.self_attn.keys_values(normed), [WindowGroup(1, len(x))]
        done = []
        for part, normed_part in zip(x.split(num_positions), normed.split(num_positions), strict=True):
            yield
            done.append(self._finish(part, self.self_attn(normed_part, groups, keys_values)))
        return torch.cat(done)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention, for all packed positions or some, `(P, D)` to `(P, D)`."""
        x = x + F.dropout(attended, self.dropout, self.training)
        activated = F.gelu(self.fc1(self.final_layer_norm(x)))
        activated = F.dropout(activated, self.activation_dropout, self.training)
        x = x + F.dropout(self.fc2(activated), self.dropout, self.training)
        return x.clamp(-FLOAT16_LIMIT, FLOAT16_LIMIT) if x.dtype == torch.float16 else x


class AudioFlamingo3Encoder(nn.Module):
    """Log-mel windows to one vector every 40 ms: two convolutions, transformer layers, average pooling, LayerNorm."""

    def __init__(self, config: AudioFlamingo3EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.hidden_size
        self.conv1 = Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(
            AudioFlamingo3EncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(width)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the encoder computes in."""
        return self.conv1.weight.dtype

    def forward(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> EncoderOutput:
        """Encodes windows.

        Args:
            input_features: log-mel windows `(W, M, T)`, any float dtype; T is at most twice `max_source_positions`.
            input_features_mask: `(W, T)`, 1 on each window's valid frames, which come first; None when all are valid.
                Frames at or beyond `2 * conv_length + 1` have no influence.

        Returns:
            The pooled, normalised rows, padded for each window and packed.

        Raises:
            ArgumentError: shapes that do not fit, or a mask whose ones do not all come first.
            DeviceError: weights in one half precision under an autocast to the other, on a CPU.
        """
        x, lengths = self.first_layers(input_features, input_features_mask)
        tokens = self.last_layers(x, lengths)  # (A, D)
        counts = [length // POOL for length in lengths]
        padded = _pad_windows(tokens, counts, num_audio_tokens(input_features.shape[2]))
        return EncoderOutput(padded, tokens, counts)

    def first_layers(
        self, input_features: Tensor, input_features_mask: Tensor | None = None, num_layers: int = 0
    ) -> tuple[Tensor, list[int]]:
        """The convolutions and so many layers: what need not be computed again while later layers are trained.

        Args:
            input_features: as for `forward`.
            input_features_mask: likewise.
            num_layers: how many layers.

        Returns:
            Positions of all windows in order, `(P, D)`, and how many each window has: one every 20 ms, none for a
            window without audio tokens.
        """
        frames = self._valid_lengths(input_features, input_features_mask)
        lengths = [conv_length(n) if num_audio_tokens(n) > 0 else 0 for n in frames]
        embedded = [self._embed(input_features[w], length) for w, length in enumerate(lengths) if length]
        if not embedded:
            return input_features.new_zeros((0, self.config.hidden_size), dtype=self.dtype), lengths
        x = F.dropout(torch.cat(embedded), self.config.dropout, self.training)  # (P, D)
        return self._run_layers(x, lengths, self.layers[:num_layers]), lengths

    def last_layers(self, x: Tensor, lengths: list[int], first_layer: int = 0) -> Tensor:
        """The layers from `first_layer` on, pooling and LayerNorm: from `first_layers` to the audio tokens.

        Args:
            x: `(P, D)`.
            lengths: positions of each window.
            first_layer: the layers before it were run.

        Returns:
            The rows that are audio tokens, of all windows in order, `(A, D)`.
        """
        x = self._run_layers(x, lengths, self.layers[first_layer:])
        pooled = [_pool(part) for part in x.split(lengths)] if lengths else [x]
        return self.layer_norm(torch.cat(pooled))

    def in_pieces(
        self, features: Tensor, num_frames: int, num_positions: int
    ) -> Generator[None, None, Tensor]:
        """Encodes one window little by little, for a caller with other work to do in between; evaluation mode only.

        Args:
            features: log-mel `(M, T)`.
            num_frames: valid frames, which come first.
            num_positions: how many positions go through a layer between two yields.

        Returns:
            The pooled, normalised rows `(A, D)`, equal to those of `forward` within rounding.
        """
        x = self._embed(features, conv_length(num_frames))  # (T, D)
        for layer in self.layers:
            assert isinstance(layer, AudioFlamingo3EncoderLayer)
            x = yield from layer.in_pieces(x, num_positions)
        return self.layer_norm(_pool(x))

    def _valid_lengths(self, input_features: Tensor, mask: Tensor | None) -> list[int]:
        """Valid frames of each window."""
        if input_features.dim() != 3 or input_features.shape[1] != self.config.num_mel_bins:
            raise ArgumentError(
                f"input_features must be (windows, {self.config.num_mel_bins}, frames), got "
                f"{tuple(input_features.shape)}."
            )
        num_windows, _, num_frames = input_features.shape
        if num_frames > 2 * self.config.max_source_positions:
            raise ArgumentError(
                f"input_features hold {num_frames} frames a window, the encoder takes at most "
                f"{2 * self.config.max_source_positions}; split the audio into windows of 30 s."
            )
        if mask is None:
            return [num_frames] * num_windows
        if mask.shape != (num_windows, num_frames):
            raise ArgumentError(
                f"input_features_mask must be {(num_windows, num_frames)} as input_features, got {tuple(mask.shape)}."
            )
        mask = mask != 0
        lengths, is_prefix = to_host(torch.stack([mask.sum(-1), (mask == mask.cummin(-1).values).all(-1)]))
        if not all(is_prefix):
            raise ArgumentError(
                "input_features_mask must hold its ones first, then its zeros, in every window."
            )
        return lengths

    def _embed(self, features: Tensor, length: int) -> Tensor:
        """Convolutions and positions of one window `(M, T)`, the first `length` positions only, `(length, D)`."""
        x = features[None, :, : 2 * length + 1].to(self.dtype)  # what the valid outputs can see
        check_autocast(x)
        x = F.gelu(self.conv1(x))[:, :, : 2 * length]
        x = F.gelu(self.conv2(x))[0].transpose(0, 1)  # (length, D)
        return x + self.embed_positions.weight[:length]

    def _run_layers(self, x: Tensor, lengths: list[int], layers: Iterable[nn.Module]) -> Tensor:
        """Layers over packed windows `(P, D)`, those of equal length side by side while they run."""
        order = sorted((w for w, length in enumerate(lengths) if length), key=lambda w: -lengths[w])
        if not order:
            return x
        parts = x.split(lengths)
        x = torch.cat([parts[w] for w in order])
        sizes = [lengths[w] for w in order]
        groups = [WindowGroup(len(list(same)), n) for n, same in groupby(sizes)]
        bounds = _bounds(sizes, x.device)
        for layer in layers:
            if self.training and self.config.layerdrop and torch.rand(()).item() < self.config.layerdrop:
                continue
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, groups, bounds, use_reentrant=False)
            else:
                x = layer(x, groups, bounds)
        done = dict(zip(order, x.split(sizes), strict=True))
        return torch.cat([done[w] for w in sorted(order)])


def _bounds(lengths: list[int], device: torch.device) -> Bounds:
    """Windows of such lengths, one behind the other, which attend to themselves."""
    offsets = list(accumulate(lengths, initial=0))
    numbers = to_device([*offsets, *lengths], device, torch.int32)
    starts, ends = numbers.split([len(offsets), len(lengths)])
    return Bounds(starts, starts, ends, max(lengths), max(lengths))


def _pool(x: Tensor) -> Tensor:
    """Means of neighbouring positions, `(T, D)` to `(T // 2, D)`."""
    return x[: x.shape[0] // POOL * POOL].unflatten(0, (-1, POOL)).mean(dim=1)


def _pad_windows(tokens: Tensor, counts: list[int], num_rows: int) -> Tensor:
    """Packed rows `(A, D)` to `(W, num_rows, D)`: `counts[w]` rows of each window, then zeros."""
    rows = [window * num_rows + row for window, count in enumerate(counts) for row in range(count)]
    index = to_device(rows, tokens.device, torch.long)
    padded = tokens.new_zeros((len(counts) * num_rows, tokens.shape[-1])).index_copy(0, index, tokens)
    return padded.unflatten(0, (len(counts), num_rows))
