"""Audio windows to the vectors that the language model reads: at once, or a little at a time beside other work."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.sequence import SequenceGroup
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor.prompt import AudioWindow

POSITIONS_PER_PIECE = 256  # of the encoder, 20 ms each: 10 to 20 ms of work in a small model on a CPU


class AudioEncoder:
    """Encodes windows, and remembers encoded ones.

    Args:
        model: encodes.
        clip_cache: encoded windows; counts them.
    """

    def __init__(self, model: AudioFlamingo3WithHead, clip_cache: ClipCache) -> None:
        self._model = model
        self._clip_cache = clip_cache
        self._begun: dict[bytes, Generator[None, None, Tensor]] = {}

    def find(self, window: AudioWindow) -> Tensor | None:
        """The encoded tokens `(A, D)` of a window, if they are there."""
        if self._clip_cache.is_off:
            return None
        tokens = self._clip_cache.get(window.key)
        return tokens

    def look_up(self, group: SequenceGroup) -> None:
        """Gives a group what is there of the audio that it needs next."""
        for window in group.missing_windows:
            tokens = self.find(window)
            if tokens is None:
                return
            group.add_audio(window, tokens)

    def encode(self, windows: Sequence[AudioWindow]) -> list[Tensor]:
        """The tokens `(A, D)` of each of some windows: those that are there, and the others, encoded together."""
        if self._clip_cache.is_off:
            return self._encode(windows)
        found = {w.key: tokens for w in windows if (tokens := self.find(w)) is not None}
        missing = {w.key: w for w in windows if w.key not in found}
        if missing:
            found |= dict(zip(missing, self._encode(list(missing.values())), strict=True))
            for key in missing:
                self._clip_cache.put(key, found[key])
        return [found[w.key] for w in windows]

    @torch.no_grad()
    def _encode(self, windows: Sequence[AudioWindow]) -> list[Tensor]:
        features = torch.stack([window.features for window in windows]).to(self._model.device)  # (W, M, T)
        frames = torch.tensor([window.num_frames for window in windows])
        mask = (torch.arange(features.shape[2]) < frames[:, None]).to(features.device)
        encoded = self._model.get_audio_features(features, mask).pooler_output  # (A, D)
        return [part.clone() for part in encoded.split([window.num_tokens for window in windows])]

    def work(self, window: AudioWindow, seconds: float) -> Tensor | None:
        """Goes on encoding a window for about so long; returns its tokens `(A, D)` once they are done."""
        end = time.perf_counter() + seconds
        pieces = self._begun.setdefault(
            window.key,
            self._model.encode_in_pieces(window.features, window.num_frames, POSITIONS_PER_PIECE),
        )
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                del self._begun[window.key]
                self._clip_cache.put(window.key, done.value)
                return done.value
            if time.perf_counter() >= end:
                return None

    def forget(self, needed: set[bytes]) -> None:
        """Drops what was begun for windows that nobody needs any more."""
        if self._begun:
            self._begun = {key: pieces for key, pieces in self._begun.items() if key in needed}
