"""Encodes audio windows a little at a time, so that a long clip does not hold up the answers that are being given."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from torch import Tensor

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.processor.prompt import AudioWindow

POSITIONS_PER_PIECE = 256  # of the encoder, 20 ms each: 10 to 20 ms of work in a small model on a CPU


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
        self._begun: dict[bytes, Generator[None, None, Tensor]] = {}
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
        pieces = self._begun.setdefault(window.key, self._in_pieces(window))
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                del self._begun[window.key]
                self._clip_cache.put(window.key, done.value)
                self.num_misses += 1
                return done.value
            if time.perf_counter() >= end:
                return None

    def forget(self, needed: set[bytes]) -> None:
        """Drops what was begun for windows that nobody needs any more."""
        self._begun = {key: pieces for key, pieces in self._begun.items() if key in needed}

    def _in_pieces(self, window: AudioWindow) -> Generator[None, None, Tensor]:
        model = self._model.model
        features = window.seen.to(model.audio_tower.conv1.weight.device)
        rows = yield from model.audio_tower.in_pieces(features, window.num_frames, POSITIONS_PER_PIECE)
        return model.multi_modal_projector(rows)
