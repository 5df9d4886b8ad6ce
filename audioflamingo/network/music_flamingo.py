"""Music Flamingo and Audio Flamingo Next: Audio Flamingo 3 that hears the time.

Nothing is learned for it. Before the projector, two parts of each encoded row are turned: one by the number of its
window in the clip, the other by its place in the window, both scaled by the seconds since the clip began (arXiv
2410.12109, in the form that the published checkpoints were trained with).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from audioflamingo.config import AudioFlamingo3Config, MusicFlamingoConfig
from audioflamingo.errors import ArgumentError
from audioflamingo.kernels.host import to_host
from audioflamingo.network.af3 import AudioFlamingo3Model, AudioFlamingo3WithHead
from audioflamingo.network.encoder import POOL
from audioflamingo.network.outputs import AudioFeaturesOutput


def time_frequencies(config: MusicFlamingoConfig) -> Tensor:
    """Frequencies of the rotary time embedding, float32 `(C / 2,)`, on the CPU."""
    width = config.num_rotary_channels
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / float(config.rope_parameters["rope_theta"]) ** exponents


MAX_TABLES = 64  # windows whose tables are kept: more than 30 minutes


class RotaryTimeEmbedding:
    """Turns rows of the encoder by the time that they stand for.

    No module and without buffers, so that nothing rounds its tables along with the weights: angles reach thousands of
    turns. Tables are made on the CPU, so that they are the same wherever the model is, and kept by window.

    Args:
        config: of the model.
    """

    def __init__(self, config: MusicFlamingoConfig) -> None:
        self._config = config
        self._theta = float(config.rope_parameters["rope_theta"])
        self._frame_step_s = config.audio_frame_step * 2 * POOL  # of one encoded row
        self._positions_per_window = config.audio_config.max_source_positions // POOL
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def angles(self, windows: Tensor, frames: Tensor) -> Tensor:
        """Angles by which pairs of neighbouring channels turn, float32 `(A, C)`; always computed on the CPU.

        The order of the operations is part of the model: at 30 minutes float32 is 0.007 off in the cosine.

        Args:
            windows: number of each row's window in its clip, int64 `(A,)`.
            frames: each row's place in its window, int64 `(A,)`.
        """
        frequencies = time_frequencies(self._config)  # (C / 2,)
        by_window = (windows.float() / self._theta)[:, None] * frequencies
        by_frame = (frames.float() / self._theta * (2 * math.pi))[:, None] * frequencies
        starts_s = windows * self._positions_per_window * self._frame_step_s
        seconds = starts_s + frames.float() * self._frame_step_s
        return torch.cat([by_window, by_frame], dim=1) * (-seconds * 2 * math.pi)[:, None]

    def _table(self, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all rows of a window, float32 `(L, C)` each; 1.5 MB in the published model."""
        table = self._tables.get((window, device))
        if table is None:
            with torch.device("cpu"):
                frames = torch.arange(self._positions_per_window)
                angles = self.angles(torch.full_like(frames, window), frames)
            table = (angles.cos().to(device), angles.sin().to(device))
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[window, device] = table
        return table

    def __call__(self, rows: Tensor, num_tokens: Sequence[int], window_index: Sequence[int]) -> Tensor:
        """Turns packed rows `(A, D)`; the result has their dtype.

        Args:
            rows: of all windows in order.
            num_tokens: rows of each window.
            window_index: number of each window in its clip.
        """
        if not len(rows):
            return rows
        counts = list(num_tokens)
        tables = [self._table(window, rows.device) for window in window_index]
        parts = [(cos[:n], sin[:n]) for n, (cos, sin) in zip(counts, tables, strict=True)]
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        cos, sin = (torch.cat(part).to(wide) for part in zip(*parts, strict=True))  # (A, C)
        num_turned = 2 * cos.shape[1]
        even, odd = rows[:, :num_turned].to(wide).unflatten(1, (-1, 2)).unbind(-1)  # (A, C) each
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(1)
        return torch.cat([turned.to(rows.dtype), rows[:, num_turned:]], dim=1)


def window_indices(token_ids: Sequence[int], audio_token_id: int, num_tokens: Sequence[int]) -> list[int]:
    """The number of each window in its clip, read off a prompt in which every clip stands apart.

    Args:
        token_ids: the prompt, or several behind each other with something between them.
        audio_token_id: id of `<sound>`; a clip is one run of it.
        num_tokens: audio tokens of each window, in order.
    """
    positions = np.flatnonzero(np.asarray(token_ids, dtype=np.int64) == audio_token_id)
    begins = {0, *(int(n) + 1 for n in np.flatnonzero(np.diff(positions) > 1))}
    indices: list[int] = []
    first = 0
    for count in num_tokens:
        begins_clip = not indices or (count > 0 and first in begins)
        indices.append(0 if begins_clip else indices[-1] + 1)
        first += count
    return indices


class MusicFlamingoModel(AudioFlamingo3Model):
    """Encoder, rotary time embedding, projector and language model, without the output layer."""

    def __init__(self, config: AudioFlamingo3Config) -> None:
        if not isinstance(config, MusicFlamingoConfig):
            raise ArgumentError(f"this model needs a MusicFlamingoConfig, got {type(config).__name__}.")
        super().__init__(config)
        self._rotary_time = RotaryTimeEmbedding(config)

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        window_index: Sequence[int] | None = None,
    ) -> AudioFeaturesOutput:
        """Encodes and projects audio windows; see `AudioFlamingo3Model.get_audio_features`.

        Args:
            input_features: the windows, `(W, M, T)`.
            input_features_mask: `(W, T)`, 1 on valid frames.
            input_ids: `(B, S)`, the prompts that the windows belong to: a clip is a run of `<sound>`.
            window_index: number of each window in its clip, in place of `input_ids`.

        Raises:
            ArgumentError: several windows, and nothing says which clips they belong to.
        """
        encoded = self.audio_tower(input_features, input_features_mask)
        if window_index is None:
            if input_ids is not None:
                rows = to_host(torch.nn.functional.pad(input_ids, (0, 1), value=-1))
                flat = [token_id for row in rows for token_id in row]
                window_index = window_indices(flat, self.config.audio_token_id, encoded.num_tokens)
            elif len(encoded.num_tokens) == 1:
                window_index = [0]
            else:
                raise ArgumentError(
                    f"{len(encoded.num_tokens)} windows: this model hears the time, so give input_ids, whose <sound> "
                    "show which windows are one clip, or window_index."
                )
        projected = self.project(encoded.audio_tokens, encoded.num_tokens, window_index)
        return AudioFeaturesOutput(encoded.last_hidden_state, projected)

    def project(
        self, audio_tokens: Tensor, num_tokens: Sequence[int], window_index: Sequence[int] | None = None
    ) -> Tensor:
        """From the encoder's rows to the language model's; see `AudioFlamingo3Model.project`."""
        assert window_index is not None, "time needs the windows' numbers"
        return super().project(self._rotary_time(audio_tokens, num_tokens, window_index), num_tokens)

    def hear(self, input_ids: Tensor | None, features: Tensor, mask: Tensor | None) -> AudioFeaturesOutput:
        """Encodes and projects the audio of prompts `(B, S)`."""
        return self.get_audio_features(features, mask, input_ids)


class MusicFlamingoWithHead(AudioFlamingo3WithHead):
    """Music Flamingo with its output layer and loss."""

    config_class = MusicFlamingoConfig
    network_class = MusicFlamingoModel
    model: MusicFlamingoModel

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        window_index: Sequence[int] | None = None,
    ) -> AudioFeaturesOutput:
        """Encodes and projects audio windows; see `MusicFlamingoModel.get_audio_features`."""
        return self.model.get_audio_features(
            input_features, input_features_mask, input_ids, window_index=window_index
        )
