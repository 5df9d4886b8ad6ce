"""The C library's heap under threads."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from audioflamingo.engine.memory import give_back_memory, share_one_heap
if sys.argv[1] == "one":
    share_one_heap()
library = ctypes.CDLL(None)
everyone = threading.Barrier(5)
def allocate():
    kept = [bytearray(600) for _ in range(1000)]
    everyone.wait()
    everyone.wait()
for _ in range(4):
    threading.Thread(target=allocate).start()
everyone.wait()
library.fdopen.restype = ctypes.c_void_p
report = ctypes.c_void_p(library.fdopen(1, b"w"))
library.malloc_info(0, report)
library.fflush(report)
everyone.wait()
give_back_memory()
"""


def count_heaps(how: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=60
    )
    return result.stdout.count("<heap nr=")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="needs glibc")
def test_threads_share_one_heap():
    assert count_heaps("many") > 1
    assert count_heaps("one") == 1
