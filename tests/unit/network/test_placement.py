"""Device placement without a GPU: a real run on the CPU is recorded, then replayed on fake CUDA tensors.

Fake tensors have a device, a dtype and a shape but no data; an operation that mixes devices fails on them as it would
on a GPU. What the code reads from the device goes through `audioflamingo.kernels.host.to_host`, so those values are
recorded
and played back.
"""

from __future__ import annotations

import importlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.support.tiny_family import make_music_batch, tiny_music_model
from tests.support.tiny_model import make_batch, tiny_model

MODULES = (
    "audioflamingo.network.encoder",
    "audioflamingo.network.qwen2",
    "audioflamingo.network.af3",
    "audioflamingo.network.loss",
    "audioflamingo.network.music_flamingo",
)


class WithoutCudaRuntime(TorchFunctionMode):
    """Spells out `x[...]` and convolutions: torch's own ask for a CUDA runtime, which a CPU build lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return self.index(*args)
        if func is torch.Tensor.__setitem__:
            target, key, value = args
            return torch.ops.aten.copy_(self.index(target, key), value)
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func is torch.Tensor.__invert__:
            return torch.logical_not(*args)
        if func is torch.conv1d:
            x, weight, bias, (stride,), (padding,) = args[:5]
            columns = torch.nn.functional.pad(x, (padding, padding)).unfold(2, weight.shape[2], stride)
            return torch.einsum("bitk,oik->bot", columns, weight) + bias.unsqueeze(1)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def index(x: torch.Tensor, key: Any) -> torch.Tensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        for place, part in enumerate(keys):
            if part is Ellipsis:
                named = sum(k is not None for k in keys) - 1
                keys[place : place + 1] = [slice(None)] * (x.dim() - named)
        tensors: list[torch.Tensor | None] = []
        for part in keys:
            axis = len(tensors)
            if part is None:
                x = x.unsqueeze(axis)
                tensors.append(None)
            elif isinstance(part, slice):
                x = torch.ops.aten.slice(x, axis, part.start, part.stop, part.step or 1)
                tensors.append(None)
            elif isinstance(part, torch.Tensor):
                tensors.append(part)
            else:
                x = x.select(axis, part)
        return x if all(t is None for t in tensors) else torch.ops.aten.index(x, tensors)


class Playback:
    """Replaces `to_host` in the modules: first records what a real run reads, then returns it again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from audioflamingo.kernels.host import to_host

        self.values: list[Any] = []
        self.replayed: Iterator[Any] | None = None
        self.devices: set[str] = set()

        def play(tensor: torch.Tensor) -> Any:
            if self.replayed is None:
                self.values.append(to_host(tensor))
                return self.values[-1]
            self.devices.add(tensor.device.type)
            return next(self.replayed)

        for name in MODULES:
            monkeypatch.setattr(importlib.import_module(name), "to_host", play)

    def compare(
        self,
        run: Callable[[Any, dict[str, Any]], Any],
        batch: dict[str, Any],
        build: Callable[[], Any] = tiny_model,
    ) -> Any:
        """Runs on the CPU, then on fake CUDA tensors, and returns the second result."""
        real = run(build(), batch)
        self.replayed = iter(self.values)
        with (
            unittest.mock.patch("tests.support.tiny_model.randomize"),
            FakeTensorMode(),
            WithoutCudaRuntime(),
        ):
            model = fake_cuda_model(build)
            fake_batch = {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in batch.items()}
            fake = run(model, fake_batch)
        assert next(self.replayed, None) is None, "the replay read fewer values than the real run"
        assert fake.shape == real.shape
        return fake


def fake_cuda_model(build: Callable[[], Any]) -> Any:
    """A tiny model with fake parameters on a CUDA device that does not exist; to be called inside a fake mode."""
    model = build()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
    return model


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
