"""Which backend runs, and what is said when it is a slow one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from audioflamingo import kernels
from audioflamingo.errors import ArgumentError, AudioFlamingoWarning
from audioflamingo.kernels import native
from tests.support.kernel_weights import random_int8


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package had been installed without a compiler."""
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "library", lambda: None)
    native.available.cache_clear()
    native.active.cache_clear()
    yield
    native.available.cache_clear()
    native.active.cache_clear()


def test_without_the_library_torch_runs_and_one_warning_says_so(unbuilt: None) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = random_int8(20, 36, generator)
    packed, scales, x = kernels.pack_int8(weights), torch.ones(20), torch.ones(1, 36)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = kernels.linear_int8(x, packed, scales, None, (20, 36))
        kernels.linear_int8(x, packed, scales, None, (20, 36))
    assert [warning.category for warning in caught] == [AudioFlamingoWarning]
    assert "compiler" in str(caught[0].message)
    assert kernels.backend() == "torch"
    assert torch.allclose(out[0], weights.float().sum(dim=1))


def test_a_processor_without_avx2_runs_plain_code_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, force: Callable[[str], None]
) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "available", lambda: ("torch", "generic"))
    native.active.cache_clear()
    with pytest.warns(AudioFlamingoWarning, match="AVX2"):
        assert kernels.backend() == "generic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.backend() == "generic"


def test_the_variable_chooses_without_a_warning(force: Callable[[str], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in native.available():
            force(name)
            assert kernels.backend() == name


@pytest.mark.skipif("avx512-vnni" not in native.available(), reason="this processor has no AVX-512 VNNI")
def test_avx512_is_the_best_of_its_kind(force: Callable[[str], None]) -> None:
    force("avx512")
    assert kernels.backend() == native.available()[-1]


def test_an_unknown_or_unavailable_backend_is_refused(
    force: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force("sse9")
    with pytest.raises(ArgumentError, match="AF3_KERNELS=sse9"):
        kernels.backend()
    monkeypatch.setattr(native, "available", lambda: ("torch", "generic"))
    force("avx512")
    with pytest.raises(ArgumentError, match="does not run here"):
        kernels.backend()


@pytest.mark.skipif(len(native.available()) == 1, reason="the compiled kernels were not built")
def test_threads_are_those_of_torch() -> None:
    """Both run on one OpenMP pool: a layer starts no threads beyond those that torch has started."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.ones(400, 400) @ torch.ones(400, 400)
        torch.ones(1_000_000).sin()
        started = _num_threads()
        packed = kernels.pack_int8(torch.ones(4096, 4096, dtype=torch.int8))
        kernels.linear_int8(torch.ones(1, 4096), packed, torch.ones(4096), None, (4096, 4096))
        assert _num_threads() == started
    finally:
        torch.set_num_threads(before)


def _num_threads() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


@pytest.mark.skipif(native.library() is None, reason="the kernels were not built")
@pytest.mark.parametrize("is_numbered", [False, True])
def test_kernels_of_another_version_are_refused(is_numbered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(**({"af3_interface": lambda: native.INTERFACE - 1} if is_numbered else {}))
    monkeypatch.setattr(native.ctypes, "CDLL", lambda _: other)
    with pytest.raises(ImportError, match="do not belong to this version"):
        native.library.__wrapped__()
