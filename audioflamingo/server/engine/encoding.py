"""Encodes audio windows a little at a time, so that a long clip does not hold up the answers that are being given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from audioflamingo.clip_cache import ClipCache
from audioflamingo.server.engine.prompt import AudioWindow


class WindowEncoder:
    """Encodes windows, and remembers encoded ones.

    Args:
        model: an `AudioFlamingo3ForConditionalGeneration`.
        clip_cache: encoded windows.

    Attributes:
        num_hits: windows that were found encoded.
        num_misses: windows that were encoded.
    """

    def __init__(self, model: Any, clip_cache: ClipCache) -> None:
        self._model = model
        self._clip_cache = clip_cache
        self._begun: dict[bytes, Iterator[Tensor | None]] = {}
        self.num_hits = 0
        self.num_misses = 0

    def find(self, window: AudioWindow) -> Tensor | None:
        """The encoded tokens `(A, D)` of a window, if they are there."""
        tokens = self._clip_cache.get(window.key)
        self.num_hits += tokens is not None
        return tokens

    def work(self, window: AudioWindow, seconds: float) -> Tensor | None:
        """Goes on encoding a window for about so long; returns its tokens `(A, D)` once they are done."""
        end = time.perf_counter() + seconds
        steps = self._begun.setdefault(window.key, self._steps(window))
        for tokens in steps:
            if tokens is not None:
                del self._begun[window.key]
                self._clip_cache.put(window.key, tokens)
                self.num_misses += 1
                return tokens
            if time.perf_counter() >= end:
                break
        return None

    def forget(self, needed: set[bytes]) -> None:
        """Drops what was begun for windows that nobody needs any more."""
        self._begun = {key: steps for key, steps in self._begun.items() if key in needed}

    def _steps(self, window: AudioWindow) -> Iterator[Tensor | None]:
        model = self._model.model
        device = model.audio_tower.conv1.weight.device
        mask = (torch.arange(window.features.shape[1]) < window.num_frames).int()
        steps = model.audio_tower.steps(window.features[None].to(device), mask[None].to(device))
        for encoded in steps:
            yield None if encoded is None else model.multi_modal_projector(encoded.audio_tokens)
