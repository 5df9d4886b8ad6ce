"""Device placement without a GPU: a real run on the CPU is recorded, then replayed on fake CUDA tensors.

Fake tensors have a device, a dtype and a shape but no data; an operation that mixes devices fails on them as it would
on a GPU. What the code reads from the device goes through `audioflamingo.kernels.host.to_host`, so those values are
recorded and played back.
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

from tests.support.tiny_model import tiny_model

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
        build_fake: Callable[[], Any] | None = None,
    ) -> Any:
        """Runs on the CPU, then on fake CUDA tensors (by default all on one device), and returns the second result."""
        real = run(build(), batch)
        self.replayed = iter(self.values)
        with (
            unittest.mock.patch("tests.support.tiny_model.randomize"),
            FakeTensorMode(),
            WithoutCudaRuntime(),
        ):
            model = fake_cuda_model(build) if build_fake is None else build_fake()
            device = model.device
            fake_batch = {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in batch.items()}
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
