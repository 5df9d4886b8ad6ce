"""Projected audio that is kept, so that a clip which was encoded once is not encoded again.

Windows of 30 s are kept one by one, since each is encoded alone: clips that share windows share their work. The key
is the content that the encoder sees, so it does not matter where a clip came from.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from audioflamingo.audio.loading import num_audio_tokens
from audioflamingo.kernels.host import to_host
from audioflamingo.processor.prompt import window_key

DEFAULT_MAX_BYTES = 256_000_000  # 47 windows (23 minutes) of the published model in bfloat16


class ClipCache:
    """Keeps the projected audio tokens of windows, the least recently used go first.

    It belongs to one model with fixed weights: call `clear` after changing them (training, adapters). Threads may
    share it; two that meet the same new window at the same time may both encode it.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration`.
        max_bytes: most memory that the kept tokens take. 0 keeps nothing.

    Attributes:
        num_hits: windows that were found.
        num_misses: windows that were encoded.
    """

    def __init__(self, model: Any, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    @torch.no_grad()
    def embed(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        """Projected audio tokens of windows, encoding those that are not known.

        Args:
            input_features: `(W, M, T)` log-mel windows, float32 from the processor; on any device.
            input_features_mask: `(W, T)`, 1 on valid frames, which come first; None when all are valid.

        Returns:
            `(A, D)` on the model's device: pass it as `audio_embeds=` to `generate`, `stream` or
            `last_token_logits`.

        Raises:
            ArgumentError: as the encoder.
        """
        num_windows, _, num_frames = input_features.shape
        lengths = (
            [num_frames] * num_windows if input_features_mask is None else to_host(input_features_mask.sum(1))
        )
        keys = [window_key(window, n) for window, n in zip(input_features, lengths, strict=True)]
        found = {key: tokens for key in keys if (tokens := self.get(key)) is not None}
        missing = {key: w for w, key in enumerate(keys) if key not in found}
        if missing:
            rows = list(missing.values())
            mask = None if input_features_mask is None else input_features_mask[rows].to(self._model.device)
            features = input_features[rows].to(self._model.device)
            encoded = self._model.get_audio_features(features, mask).pooler_output  # (A', D)
            counts = [num_audio_tokens(lengths[w]) for w in rows]
            found |= dict(zip(missing, (part.clone() for part in encoded.split(counts)), strict=True))
            for key in missing:
                self.put(key, found[key])
        with self._lock:
            self.num_hits += num_windows - len(missing)
            self.num_misses += len(missing)
        return torch.cat([found[key] for key in keys])

    @property
    def is_off(self) -> bool:
        """Whether nothing is kept."""
        return self._max_bytes == 0

    def clear(self) -> None:
        """Forgets everything, for example because the weights changed."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def get(self, key: bytes) -> Tensor | None:
        """The tokens `(A, D)` of a window, if they are kept; see `window_key`."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: bytes, tokens: Tensor) -> None:
        """Keeps the tokens `(A, D)` of a window, in a tensor of their own."""
        with self._lock:
            if key in self._kept or tokens.nbytes > self._max_bytes:
                return
            self._kept[key] = tokens
            self.num_bytes += tokens.nbytes
            while self.num_bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.num_bytes -= oldest.nbytes
