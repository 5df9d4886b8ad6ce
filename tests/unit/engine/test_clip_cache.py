"""Windows that were encoded are not encoded again, whatever surrounds them, and memory is bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.audio_encoder import AudioEncoder
from audioflamingo.errors import ArgumentError
from audioflamingo.processor.prompt import AudioWindow
from tests.support.tiny_model import make_batch, tiny_model


class Counting:
    """A model that counts the windows that it encodes."""

    def __init__(self) -> None:
        self.model = tiny_model()
        self.device = self.model.device
        self.num_encoded = 0

    def get_audio_features(self, input_features: Tensor, mask: Tensor | None = None) -> Any:
        self.num_encoded += len(input_features)
        return self.model.get_audio_features(input_features, mask)


@pytest.fixture(name="counting")
def make_counting() -> Counting:
    return Counting()


def windows(*frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch = make_batch([(list(frames), 4)], seed=seed)
    return batch["input_features"], batch["input_features_mask"]


class Encoder:
    """An encoder with a cache, asked for batches of windows."""

    def __init__(self, counting: Counting, **options: int) -> None:
        self.clip_cache = ClipCache(**options)
        self._encoder = AudioEncoder(counting, self.clip_cache)

    def embed(self, features: Tensor, mask: Tensor) -> Tensor:
        frames = mask.sum(1).tolist()
        windows = [AudioWindow(window, count, 0) for window, count in zip(features, frames, strict=True)]
        return torch.cat(self._encoder.encode(windows))


@torch.no_grad()
def encode(counting: Counting, features: Tensor, mask: Tensor | None) -> Tensor:
    return counting.model.get_audio_features(features, mask).pooler_output


def test_known_windows_are_not_encoded_again(counting: Counting) -> None:
    features, mask = windows(300, 40, 500)
    cache = Encoder(counting)
    first = cache.embed(features, mask)
    assert torch.equal(first, encode(counting, features, mask))
    assert torch.equal(cache.embed(features, mask), first)
    assert (counting.num_encoded, cache.clip_cache.num_hits, cache.clip_cache.num_misses) == (3, 3, 3)
    order = [2, 0, 2]
    again = cache.embed(features[order], mask[order])
    torch.testing.assert_close(again, encode(counting, features[order], mask[order]))
    assert counting.num_encoded == 3


def test_only_what_the_encoder_sees_counts(counting: Counting) -> None:
    features, mask = windows(301)
    cache = Encoder(counting)
    cache.embed(features, mask)
    padded = features.clone()
    padded[:, :, 303:] = 7
    cache.embed(padded, mask)
    assert counting.num_encoded == 1
    heard = features.clone()
    heard[0, 0, 300] += 1e-3
    cache.embed(heard, mask)
    shorter = mask.clone()
    shorter[:, 299:] = 0
    cache.embed(features, shorter)
    assert counting.num_encoded == 3


def test_a_window_twice_in_one_call_is_encoded_once(counting: Counting) -> None:
    features, mask = windows(200)
    both = Encoder(counting).embed(features[[0, 0]], mask[[0, 0]])
    assert counting.num_encoded == 1
    assert torch.equal(both[:50], both[50:])


def test_the_least_recently_used_window_goes_first(counting: Counting) -> None:
    features, mask = windows(400, 400, 400)
    size = encode(counting, features[:1], mask[:1]).nbytes
    cache = Encoder(counting, max_bytes=2 * size)
    for window in (0, 1, 0, 2):
        cache.embed(features[[window]], mask[[window]])
    assert cache.clip_cache.num_bytes == 2 * size
    counting.num_encoded = 0
    cache.embed(features[[0, 2]], mask[[0, 2]])
    assert counting.num_encoded == 0
    cache.embed(features[[1]], mask[[1]])
    assert counting.num_encoded == 1


def test_nothing_is_kept_of_what_does_not_fit_or_was_cleared(counting: Counting) -> None:
    features, mask = windows(400)
    for cache in (Encoder(counting, max_bytes=0), Encoder(counting)):
        first = cache.embed(features, mask)
        cache.clip_cache.clear()
        assert cache.clip_cache.num_bytes == 0
        counting.num_encoded = 0
        assert torch.equal(cache.embed(features, mask), first)
        assert counting.num_encoded == 1


def test_embeddings_take_the_place_of_windows(counting: Counting) -> None:
    batch = make_batch([([300], 5), ([40, 3000], 3)])
    model = counting.model
    expected = model.generate(**batch, max_new_tokens=5)
    embeds = model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, audio_embeds=embeds, max_new_tokens=5), expected)
    with pytest.raises(ArgumentError, match="not both"):
        model.generate(**batch, audio_embeds=embeds, max_new_tokens=5)
