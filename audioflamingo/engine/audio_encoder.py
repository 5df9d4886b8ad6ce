"""Audio windows to the vectors that the language model reads: at once, or a little at a time beside other work."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.sequence import SequenceGroup
from audioflamingo.kernels.host import to_device
from audioflamingo.network.adapters import routed
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor.prompt import AudioWindow

MAX_WINDOWS = 16  # encoded together: at the published width each takes some 30 MB meanwhile
POSITIONS_PER_PIECE = 256  # of the encoder, 20 ms each: 10 to 20 ms of work in a small model on a CPU
ALL_POSITIONS = 1 << 20  # on a GPU, where a layer of a whole window takes less time than its launches


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

    def _key(self, window: AudioWindow, adapter: str | None) -> bytes:
        """What a window is remembered by: adapters that change how audio is encoded have their own."""
        salt = 0 if adapter is None else self._model.adapters.audio_salt(adapter)
        return window.key if not salt else window.key + salt.to_bytes(8, "little")

    def find(self, window: AudioWindow, adapter: str | None = None) -> Tensor | None:
        """The encoded tokens `(A, D)` of a window, if they are there."""
        return None if self._clip_cache.is_off else self._clip_cache.get(self._key(window, adapter))

    def look_up(self, group: SequenceGroup) -> None:
        """Gives a group what is there of the audio that it needs next."""
        for window in group.missing_windows:
            tokens = self.find(window, group.request.adapter)
            if tokens is None:
                return
            group.add_audio(window, tokens)

    def encode(self, windows: Sequence[AudioWindow], adapter: str | None = None) -> list[Tensor]:
        """The tokens `(A, D)` of each of some windows: those that are there, and the others, encoded together."""
        if self._clip_cache.is_off:
            return self._encode(windows, adapter)
        keys = [self._key(window, adapter) for window in windows]
        found = {
            key: tokens for key in dict.fromkeys(keys) if (tokens := self._clip_cache.get(key)) is not None
        }
        missing = {key: w for key, w in zip(keys, windows, strict=True) if key not in found}
        if missing:
            found |= dict(zip(missing, self._encode(list(missing.values()), adapter), strict=True))
            for key in missing:
                self._clip_cache.put(key, found[key])
        return [found[key] for key in keys]

    def _encode(self, windows: Sequence[AudioWindow], adapter: str | None) -> list[Tensor]:
        parts = (windows[first : first + MAX_WINDOWS] for first in range(0, len(windows), MAX_WINDOWS))
        return [tokens for part in parts for tokens in self._encode_together(part, adapter)]

    @torch.no_grad()
    def _encode_together(self, windows: Sequence[AudioWindow], adapter: str | None) -> list[Tensor]:
        device = self._model.device
        parts = [window.features for window in windows]
        # Autocast to one half precision stacks no tensors of the other.
        with torch.autocast(parts[0].device.type, enabled=False):
            features = to_device(torch.stack(parts), device)  # (W, M, T)
        frames = torch.tensor([window.num_frames for window in windows])
        mask = to_device(torch.arange(features.shape[2]) < frames[:, None], device)
        timed = {"window_index": numbers} if (numbers := _numbers(windows)) else {}
        with routed([adapter]):
            encoded = self._model.get_audio_features(features, mask, **timed).pooler_output  # (A, D)
        return [part.clone() for part in encoded.split([window.num_tokens for window in windows])]

    def work(self, window: AudioWindow, seconds: float, adapter: str | None = None) -> Tensor | None:
        """Goes on encoding a window for about so long; returns its tokens `(A, D)` once they are done."""
        end = time.perf_counter() + seconds
        num_positions = ALL_POSITIONS if self._model.device.type == "cuda" else POSITIONS_PER_PIECE
        key = self._key(window, adapter)
        pieces = self._begun.setdefault(
            key,
            self._model.encode_in_pieces(
                window.features, window.num_frames, num_positions, *_numbers([window])
            ),
        )
        with routed([adapter]):
            while True:
                try:
                    next(pieces)
                except StopIteration as done:
                    del self._begun[key]
                    self._clip_cache.put(key, done.value)
                    return done.value
                if time.perf_counter() >= end:
                    return None

    def forget(self, needed: Sequence[tuple[AudioWindow, str | None]]) -> None:
        """Drops what was begun for windows, each with its adapter, that nobody needs any more."""
        if self._begun:
            keys = {self._key(window, adapter) for window, adapter in needed}
            self._begun = {key: pieces for key, pieces in self._begun.items() if key in keys}


def _numbers(windows: Sequence[AudioWindow]) -> list[int]:
    """Which window of its clip each one is; nothing for a model that does not hear the time."""
    return [window.index for window in windows if window.index is not None]
