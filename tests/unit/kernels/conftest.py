from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from audioflamingo.kernels import native


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Runs what follows on the backend of that name."""

    def choose(name: str) -> None:
        monkeypatch.setenv(native.VARIABLE, name)
        native.active.cache_clear()

    yield choose
    native.active.cache_clear()
