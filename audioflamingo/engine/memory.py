"""The C library's heap (glibc): one for all threads, and what a busy time left behind goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_heap() -> None:
    """Makes all threads allocate from one heap, in place of one each that fragments by itself. Call it before threads.

    Large tensors have mappings of their own, and Python's threads take turns: they seldom wait for one another here.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Returns what is free to the system; takes milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
