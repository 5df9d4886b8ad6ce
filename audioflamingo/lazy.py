"""Packages whose parts are imported when first used, so that importing a package costs nothing."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

# What is there when the process ends goes with it: to look through torch's objects for cycles then takes 0.4 s.
atexit.register(gc.freeze)


@contextmanager
def uncollected() -> Iterator[None]:
    """A block without garbage collection, for imports.

    What modules make stays; to look it through again and again takes a sixth of the time of importing torch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`.

    Args:
        package: its `__name__`.
        homes: the module of the package, relative to it, in which each public name stands.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with uncollected():
            module = import_module(f"{package}.{homes[name]}")
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return find
