"""The C library's heap (glibc): one for all threads, and what a busy time left behind goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # of glibc's malloc.h
_OWN_MAPPING_BYTES = 4 << 20


def share_one_heap() -> None:
    """Makes all threads allocate from one heap, in place of one each that fragments by itself. Call it before threads.

    Large tensors have mappings of their own, and Python's threads take turns: they seldom wait for one another here.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def map_large_blocks() -> None:
    """Keeps blocks of 4 MiB and more out of the heap for good, so that what is freed is free.

    Left to itself, glibc takes blocks of up to 32 MiB from the heap once one was freed, and a training step leaves
    holes in it in every layer that the next layer's blocks do not fit.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)


def give_back_memory() -> None:
    """Returns what is free to the system; takes milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
