"""The network on a GPU, without one; see `tests.support.fake_cuda` for the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.fake_cuda import Playback
from tests.support.tiny_family import make_music_batch, tiny_music_model
from tests.support.tiny_model import make_batch, tiny_model


@pytest.fixture
def playback(monkeypatch: pytest.MonkeyPatch) -> Playback:
    return Playback(monkeypatch)


def test_forward_stays_on_the_device(playback: Playback) -> None:
    @torch.no_grad()
    def run(model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch).logits

    fake = playback.compare(run, make_batch([([300, 1], 6), ([], 4), ([50], 9)]))
    assert fake.device.type == "cuda"
    assert playback.devices == {"cuda"}


def test_the_time_of_music_stays_on_the_device(playback: Playback) -> None:
    @torch.no_grad()
    def run(model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch).logits

    batch = make_music_batch([([[3000, 300], [50]], 6), ([[80]], 4)])
    assert playback.compare(run, batch, tiny_music_model).device.type == "cuda"


def test_prefill_and_decode_stay_on_the_device(playback: Playback) -> None:
    @torch.no_grad()
    def run(model: Any, batch: dict[str, Any]) -> Any:
        cache = model.new_cache(2, 200)
        logits = model(**batch, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for _ in range(2):
            logits = model(logits.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
        cache.select([1])
        return model(logits.argmax(-1, keepdim=True)[:1], past_key_values=cache).logits[:, -1]

    assert playback.compare(run, make_batch([([300], 6), ([50], 9)])).device.type == "cuda"


def test_loss_stays_on_the_device(playback: Playback) -> None:
    """Forward only: torch's CPU build cannot record gradients on another device, not even on fake tensors."""

    @torch.no_grad()
    def run(model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch).loss

    batch = make_batch([([300], 6), ([50], 9)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert playback.compare(run, batch).device.type == "cuda"


def test_mixed_devices_are_caught_by_this_method(playback: Playback) -> None:
    """The method itself: a tensor left on the CPU must fail."""

    @torch.no_grad()
    def run(model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None]).logits

    with pytest.raises(Exception, match=r"device|cpu"):
        playback.compare(run, make_batch([([300], 6)]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_real_gpu_gives_the_same_logits() -> None:
    batch = make_batch([([300, 1], 6), ([], 4), ([50], 9)])
    expected = tiny_model()(**batch).logits
    got = tiny_model().to("cuda")(**{k: v.to("cuda") for k, v in batch.items()}).logits
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=0)
