"""Adapters beside a model: LoRA (arXiv 2106.09685) and replaced weights, each for the rows of a call that ask for it.

The model's own weights never change and rows without an adapter run exactly as if none were loaded. A layer that an
adapter touches looks up, on every call, which of its rows belong to which adapter (`routed`); all others do not know.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audioflamingo.errors import ArgumentError
from audioflamingo.kernels import linear_halves
from audioflamingo.kernels.host import to_host
from audioflamingo.kernels.modules import Linear

AUDIO_PREFIXES = ("model.audio_tower.", "model.multi_modal_projector.")
_numbers = itertools.count(1)  # of all adapters ever loaded


@dataclass(eq=False)
class Lora:
    """The low-rank change of one linear layer: `scale * up(down(x))`.

    Attributes:
        down: `(rank, in_features)`.
        up: `(out_features, rank)`.
        scale: alpha / rank, or alpha / sqrt(rank).
    """

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        if self.down.device != x.device or self.down.dtype != x.dtype:
            self.down, self.up = (weight.to(x.device, x.dtype) for weight in (self.down, self.up))
        return linear_halves(linear_halves(x, self.down, None), self.up, None) * self.scale

    def change(self) -> Tensor:
        """What it adds to the weights, float32 `(out_features, in_features)`."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(eq=False)
class AdapterWeights:
    """An adapter, by the names of the model's modules.

    Attributes:
        lora: changes of linear layers.
        replaced: tensors in place of the model's own, by module and by name in it.
        number: no other adapter has it, not even a later one of the same name.
    """

    lora: dict[str, Lora] = field(default_factory=dict)
    replaced: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def modules(self) -> list[str]:
        """Names of the modules that it touches."""
        return sorted({*self.lora, *self.replaced})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of its tensors, in a fixed order."""
        for name in self.modules:
            if name in self.lora:
                yield f"{name}.down", self.lora[name].down
                yield f"{name}.up", self.lora[name].up * self.lora[name].scale
            for leaf, tensor in sorted(self.replaced.get(name, {}).items()):
                yield f"{name}.{leaf}", tensor

    @property
    def changes_audio(self) -> bool:
        """Whether audio is encoded differently with it."""
        return any(name.startswith(AUDIO_PREFIXES) for name in self.modules)


@dataclass(frozen=True, eq=False)
class Route:
    """Which adapter each row of a call uses.

    Attributes:
        names: the adapters.
        rows: for each row the place of its adapter in `names`, -1 for none; None when all rows use the only one.
    """

    names: tuple[str, ...]
    rows: np.ndarray | None = None
    _found: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def of(self, name: str, device: torch.device) -> Tensor:
        """Which rows, of several adapters', are one's; every layer asks, the first answer is kept."""
        if (name, device) not in self._found:
            places = np.flatnonzero(self.rows == self.names.index(name))
            self._found[name, device] = torch.tensor(places.tolist(), dtype=torch.long, device=device)
        return self._found[name, device]


_route: ContextVar[Route | None] = ContextVar("route", default=None)


@contextmanager
def _under(route: Route | None) -> Iterator[None]:
    token = _route.set(route)
    try:
        yield
    finally:
        _route.reset(token)


def routed(names: Sequence[str | None], counts: Sequence[int] | None = None) -> Any:
    """A context in which the model's packed rows use adapters.

    Args:
        names: an adapter, or None for the model itself, one for each stretch of rows.
        counts: rows of each stretch; None for a single one that is all rows of whatever runs.
    """
    if counts is None:
        (name,) = names
        return _under(None if name is None else Route((name,)))
    used = tuple(dict.fromkeys(name for name in names if name is not None))
    if not used:
        return _under(None)
    if set(names) == set(used) and len(used) == 1:
        return _under(Route(used))
    places = [-1 if name is None else used.index(name) for name in names]
    return _under(Route(used, np.repeat(places, counts)))


def routed_to(rows: Tensor) -> Any:
    """A context for what runs on some of the rows only, `(R,)`."""
    route = _route.get()
    if route is None or route.rows is None:
        return _under(route)
    return _under(Route(route.names, route.rows[to_host(rows)]))


class AdaptedForward:
    """Stands in for the `forward` of a module that adapters touch.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = module.forward
        self.own: dict[str, tuple[Lora | None, nn.Module | None]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The module's result, for each row with its adapter."""
        route = _route.get()
        names = [] if route is None else [name for name in route.names if name in self.own]
        if route is None or not names:
            return self.original(x)
        if route.rows is None:
            lora, module = self.own[names[0]]
            return _add(lora, x, self._run(module, x) if module is not None else self.original(x))
        assert len(route.rows) == len(x), "adapters are routed by packed rows"
        out: Tensor = self.original(x)
        for name in names:
            rows = route.of(name, x.device)
            lora, module = self.own[name]
            some = x.index_select(0, rows)
            value = (
                self._run(module, some) if module is not None else out.index_select(0, rows.to(out.device))
            )
            out = out.index_copy(0, rows.to(out.device), _add(lora, some, value).to(out.device))
        return out

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The result of a module in place of the original, which it follows to other devices and dtypes."""
        own = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if own is not None and any(
            (p.dtype, p.device) != (own.dtype, own.device) for p in module.parameters()
        ):
            module.to(own.device, own.dtype)
        result: Tensor = module(x.to(next(module.parameters()).device))
        return result


def _add(lora: Lora | None, x: Tensor, value: Tensor) -> Tensor:
    return value if lora is None else value + lora(x.to(value.device))


class Adapters:
    """The adapters of one model by name."""

    def __init__(self) -> None:
        self._loaded: dict[str, AdapterWeights] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def __getitem__(self, name: str) -> AdapterWeights:
        if name not in self._loaded:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise ArgumentError(
                f"there is no adapter {name!r}; loaded: {known}. model.load_adapter(path, name) loads one."
            )
        return self._loaded[name]

    def salt(self, name: str | None) -> int:
        """A number that keeps what was computed with an adapter apart from all else; 0 without one."""
        return 0 if name is None else self[name].number

    def audio_salt(self, name: str | None) -> int:
        """The same for encoded audio, which most adapters leave alone."""
        return 0 if name is None or not self[name].changes_audio else self[name].number

    def add(self, model: nn.Module, name: str, weights: AdapterWeights) -> None:
        """Puts an adapter beside a model.

        Raises:
            ArgumentError: the name is taken, or none.
        """
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"an adapter's name must be a text, got {name!r}.")
        if name in self._loaded:
            raise ArgumentError(
                f"there is an adapter {name!r} already; choose another name, or delete_adapter it first."
            )
        for module_name in weights.modules:
            module = model.get_submodule(module_name)
            if not isinstance(module.forward, AdaptedForward):
                module.forward = AdaptedForward(module)
            forward: AdaptedForward = module.forward
            tensors = weights.replaced.get(module_name)
            forward.own[name] = (
                weights.lora.get(module_name),
                None if tensors is None else with_tensors(module, tensors),
            )
        self._loaded[name] = weights

    def remove(self, model: nn.Module, name: str) -> AdapterWeights:
        """Takes an adapter away; the model is then what it was before."""
        weights = self[name]
        for module_name in weights.modules:
            module: Any = model.get_submodule(module_name)
            del module.forward.own[name]
            if not module.forward.own:
                original = module.forward.original
                del module.forward
                if module.forward != original:  # somebody else had replaced it before
                    module.forward = original
        del self._loaded[name]
        return weights


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that shares everything with another but some tensors of its own.

    Of a quantized layer whose weights are replaced, the new one is not quantized.
    """
    template: Any = module
    if "weight" in tensors and "weight" not in module._parameters:
        is_embedding = not hasattr(module, "in_features")
        weight = tensors["weight"]
        with torch.device("meta"):
            new: Any = (
                nn.Embedding(*weight.shape) if is_embedding else Linear(weight.shape[1], weight.shape[0])
            )
        if not is_embedding:
            new._parameters["bias"] = template.bias
        dtype = template.dtype if is_embedding else tensors["weight"].dtype
    else:
        new = copy.copy(module)
        new.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
        new._parameters = dict(module._parameters)
        dtype = next((p.dtype for p in module._parameters.values() if p is not None), None)
    device = next(iter((*module.parameters(), *module.buffers()))).device
    for leaf, tensor in tensors.items():
        new._parameters[leaf] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    return new


@torch.no_grad()
def merge(model: nn.Module, weights: AdapterWeights) -> None:
    """Folds an adapter into a model's own weights, in place; in float32, then rounded once.

    Raises:
        ArgumentError: the model is quantized.
    """
    for name in weights.modules:
        module: Any = model.get_submodule(name)
        if name in weights.lora and "weight" not in module._parameters:
            raise ArgumentError(
                "the model is quantized: merge the adapter into the original, then quantize that."
            )
        for leaf, tensor in weights.replaced.get(name, {}).items():
            module._parameters[leaf].copy_(tensor)
        if name in weights.lora:
            weight = module.weight
            weight.copy_(weight.float() + weights.lora[name].change().to(weight.device))
