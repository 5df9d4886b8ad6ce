"""The compiled kernels, called through ctypes, which lets other Python threads run meanwhile."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence

from audioflamingo.errors import ArgumentError, AudioFlamingoWarning

VARIABLE = "AF3_KERNELS"
TORCH = "torch"
LEVELS = ("generic", "avx2", "avx512-vnni", "avx512-bf16")  # in the order of api.cpp
CHOICES = (TORCH, "generic", "avx2", "avx512", *LEVELS[2:])

INTERFACE = 3  # of api.cpp's functions: a library with other arguments must not be called
STEP_POINTERS = 28  # of a layer, in the order of StepLayer in step.h

_OUT_OF_MEMORY = 1


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None where it was not built.

    Raises:
        ImportError: it was built from another version of the sources.
    """
    spec = importlib.util.find_spec("audioflamingo.kernels._native")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    if not hasattr(loaded, "af3_interface") or loaded.af3_interface() != INTERFACE:
        raise ImportError(
            f"the compiled kernels in {spec.origin} do not belong to this version of the package: install "
            "audioflamingo again, or in a source tree run `python setup.py build_ext --inplace`."
        )
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    loaded.af3_best_level.argtypes = []
    loaded.af3_linear.argtypes = [integer] * 7 + [pointer] * 5
    loaded.af3_linear_bf16.argtypes = [integer] * 5 + [pointer] * 4
    loaded.af3_linear_bf16.restype = None
    loaded.af3_attention.argtypes = [integer] * 4 + [ctypes.c_float] + [pointer] * 9
    loaded.af3_linear_half.argtypes = [integer] * 5 + [pointer] * 4
    loaded.af3_linear_half.restype = None
    loaded.af3_step.argtypes = [*[integer] * 2, ctypes.c_float, ctypes.c_int64, *[pointer] * 8]
    return loaded


@functools.cache
def available() -> tuple[str, ...]:
    """Every backend that runs here, the plainest first."""
    loaded = library()
    return (TORCH,) if loaded is None else (TORCH, *LEVELS[: loaded.af3_best_level() + 1])


@functools.cache
def active() -> str:
    """The backend in use: the fastest, or the one that `AF3_KERNELS` names. Warns once of a slow one nobody chose.

    Raises:
        ArgumentError: `AF3_KERNELS` names a backend that does not exist or does not run here.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen:
        return _forced(chosen)
    best = available()[-1]
    if best == TORCH:
        _warn(
            "The compiled kernels were not built, so quantized layers and bfloat16 decoding run in plain torch: "
            "the same numbers, many times slower. Install a C++ compiler, then reinstall audioflamingo."
        )
    elif best == LEVELS[0]:
        _warn(
            "This processor has no AVX2, so quantized layers run in plain C++: the same numbers, several times "
            "slower."
        )
    return best


def linear(
    backend: str,
    threads: int,
    dtype: int,
    group: int,
    sizes: tuple[int, int, int],
    pointers: tuple[int | None, ...],
) -> None:
    """Runs a quantized layer; arguments as in api.cpp, already checked.

    Raises:
        MemoryError: no memory for the rounded activations.
    """
    loaded = library()
    assert loaded is not None
    if loaded.af3_linear(LEVELS.index(backend), threads, dtype, group, *sizes, *pointers) == _OUT_OF_MEMORY:
        raise MemoryError(f"no memory for {sizes[0]} rows of {sizes[2]} activations")


def linear_bf16(
    backend: str, threads: int, sizes: tuple[int, int, int], pointers: tuple[int | None, ...]
) -> None:
    """Runs a bfloat16 layer of at most 16 rows; arguments as in api.cpp, already checked."""
    loaded = library()
    assert loaded is not None
    loaded.af3_linear_bf16(LEVELS.index(backend), threads, *sizes, *pointers)


def linear_half(threads: int, sizes: tuple[int, int, int], pointers: tuple[int | None, ...]) -> None:
    """Runs a layer with float16 weights on at most 16 rows; arguments as in api.cpp, already checked."""
    loaded = library()
    assert loaded is not None
    loaded.af3_linear_half(LEVELS.index(active()), threads, *sizes, *pointers)


def attention(
    backend: str,
    threads: int,
    settings: tuple[int, bool, float],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    pointers: tuple[int, ...],
) -> None:
    """Runs attention; arguments as in api.cpp, already checked.

    Raises:
        MemoryError: no memory for a block of keys a thread.
    """
    loaded = library()
    assert loaded is not None
    arrays = (ctypes.c_int * len(sizes))(*sizes), (ctypes.c_int64 * len(strides))(*strides)
    if loaded.af3_attention(LEVELS.index(backend), threads, *settings, *arrays, *pointers) == _OUT_OF_MEMORY:
        raise MemoryError(f"no memory for attention with {sizes[-1]} dimensions a head")


@functools.cache
def has_step() -> bool:
    """Whether `step` and `linear_half` can be called: compiled kernels, and AVX2."""
    return active() not in (TORCH, LEVELS[0])


def step(
    threads: int,
    sizes: tuple[int, ...],
    epsilon: float,
    head_stride: int,
    layers: Sequence[int],
    pointers: tuple[int, ...],
) -> None:
    """Runs all layers over one new token a row; arguments as in api.cpp, already checked.

    Raises:
        MemoryError: no memory to work in.
    """
    loaded = library()
    assert loaded is not None
    assert len(layers) == sizes[0] * STEP_POINTERS
    level = LEVELS.index(active())
    arrays = (ctypes.c_int * len(sizes))(*sizes), (ctypes.c_void_p * len(layers))(*layers)
    if loaded.af3_step(level, threads, epsilon, head_stride, *arrays, *pointers) == _OUT_OF_MEMORY:
        raise MemoryError(f"no memory for a step of {sizes[1]} rows")


def _forced(chosen: str) -> str:
    if chosen not in CHOICES:
        raise ArgumentError(f"{VARIABLE}={chosen} is unknown: use one of {', '.join(CHOICES)}.")
    fitting = [name for name in available() if name == chosen or name.startswith(f"{chosen}-")]
    if not fitting:
        raise ArgumentError(f"{VARIABLE}={chosen} does not run here: use one of {', '.join(available())}.")
    return fitting[-1]


def _warn(message: str) -> None:
    warnings.warn(message, AudioFlamingoWarning, stacklevel=4)
