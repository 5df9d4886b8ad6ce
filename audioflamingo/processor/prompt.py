"""A conversation as the engine takes it: token ids, the audio windows behind them, and what makes each token unique."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from audioflamingo.audio.loading import conv_length, num_audio_tokens
from audioflamingo.errors import PromptError
from audioflamingo.kernels.host import to_host


@dataclass(frozen=True, eq=False)
class AudioWindow:
    """At most 30 s of a clip, ready for the encoder.

    Attributes:
        features: log-mel `(M, T)`, cut behind the last frame that the encoder looks at.
        num_frames: valid ones among them.
        start: position of its first audio token in the prompt.
        num_tokens: its audio tokens.
        key: digest of what the encoder sees, see `ClipCache`.
    """

    features: Tensor
    num_frames: int
    start: int
    num_tokens: int
    key: bytes

    @property
    def end(self) -> int:
        """Position behind its last audio token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """What an answer continues.

    Attributes:
        token_ids: with `<sound>` repeated for each audio token.
        identity: int64 `(S,)`: equal beginnings mean equal keys and values. The id of a text token, a negative number
            that stands for the window of an audio token.
        windows: in order.
    """

    token_ids: list[int]
    identity: np.ndarray
    windows: tuple[AudioWindow, ...] = ()

    @property
    def num_audio_tokens(self) -> int:
        """Audio tokens among the `token_ids`."""
        return sum(window.num_tokens for window in self.windows)


def build_prompt(processor: Any, messages: Sequence[dict[str, Any]]) -> Prompt:
    """Renders a conversation and prepares its audio. Costs time: not for the event loop.

    Args:
        processor: an `AudioFlamingo3Processor`.
        messages: as `apply_chat_template` takes them.

    Raises:
        PromptError: a conversation of the wrong form.
        AudioError: a clip that is too short or too long.
    """
    batch = processor.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=True, return_dict=True, on_long="error"
    )
    return prompt_of_batch(batch, processor.audio_token_id)


def prompt_of_batch(batch: Any, audio_token_id: int) -> Prompt:
    """Takes the one row of a processor's batch."""
    if len(batch["input_ids"]) != 1:
        raise PromptError(f"the engine takes one conversation at a time, got {len(batch['input_ids'])}.")
    token_ids: list[int] = to_host(batch["input_ids"][0])
    identity = np.array(token_ids, dtype=np.int64)
    if "input_features" not in batch:
        return Prompt(token_ids, identity)
    positions = np.flatnonzero(identity == audio_token_id)
    windows = []
    num_before = 0
    lengths = to_host(batch["input_features_mask"].sum(1))
    for features, num_frames in zip(batch["input_features"], lengths, strict=True):
        key = window_key(features, num_frames)
        num_tokens = num_audio_tokens(num_frames)
        seen = features[:, : 2 * conv_length(num_frames) + 1].clone()
        windows.append(AudioWindow(seen, num_frames, int(positions[num_before]), num_tokens, key))
        identity[positions[num_before : num_before + num_tokens]] = _audio_identity(key)
        num_before += num_tokens
    return Prompt(token_ids, identity, tuple(windows))


def _audio_identity(key: bytes) -> int:
    """A negative number for a window. Positions within it need none of their own: equal beginnings align them."""
    return -1 - (int.from_bytes(key[:8], "big") >> 1)


def window_key(window: Tensor, num_frames: int) -> bytes:
    """Digest of what the encoder sees of a window `(M, T)` with `num_frames` valid frames."""
    seen = window[:, : 2 * conv_length(num_frames) + 1].float().cpu().contiguous()
    header = f"{num_frames} {tuple(seen.shape)}".encode()
    return hashlib.blake2b(header + seen.numpy().tobytes(), digest_size=16).digest()
