"""The key/value cache: rows of unequal length, selection, growth."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from audioflamingo.errors import ArgumentError, ContextLengthError
from audioflamingo.network.kv import KVCache

K, E = 2, 4


def append(cache: KVCache, num_new: list[int], start: float = 0.0) -> torch.Tensor:
    """Appends tokens whose keys are consecutive numbers, and returns the key buffer."""
    total = sum(num_new)
    keys = (torch.arange(total).float() + start)[:, None, None].expand(total, K, E)
    buffer, values = cache.view(num_new, keys.device).write(0, keys, -keys)
    cache.advance(num_new)
    for span in cache.spans:
        slots = slice(span.start, span.start + span.length)
        assert torch.equal(buffer[:, slots], -values[:, slots])
    return buffer


def row(cache: KVCache, index: int) -> list[float]:
    """Keys of one row, as the consecutive numbers that were written."""
    buffer, span = cache.store.keys[0], cache.spans[index]
    assert buffer is not None
    return buffer[0, span.start : span.start + span.length, 0].tolist()


def test_rows_of_unequal_length_stand_side_by_side() -> None:
    cache = KVCache(1, 2, 10)
    append(cache, [3, 1])
    append(cache, [1, 1], start=100)
    assert cache.lengths == [4, 2]
    assert row(cache, 0) == [0, 1, 2, 100]
    assert row(cache, 1) == [3, 101]


def test_select_keeps_reorders_and_duplicates() -> None:
    cache = KVCache(1, 3, 10)
    append(cache, [2, 1, 3])
    cache.select([2, 0, 2])
    assert cache.lengths == [3, 2, 3]
    assert [row(cache, i) for i in range(3)] == [[3, 4, 5], [0, 1], [3, 4, 5]]
    append(cache, [1, 1, 1], start=50)
    assert row(cache, 0) == [3, 4, 5, 50]
    assert row(cache, 2) == [3, 4, 5, 52]
    with pytest.raises(ArgumentError, match="do not exist"):
        cache.select([3])


def test_crop_forgets_the_tail() -> None:
    cache = KVCache(1, 2, 10)
    append(cache, [4, 4])
    cache.crop([1, 4])
    append(cache, [2, 2], start=70)
    assert row(cache, 0) == [0, 70, 71]
    assert row(cache, 1) == [4, 5, 6, 7, 72, 73]
    with pytest.raises(ArgumentError, match="crop"):
        cache.crop([9, 0])


def test_it_grows_to_its_limit_and_no_further() -> None:
    cache = KVCache(1, 1, 10, initial_length=2)
    assert append(cache, [2]).shape[1] == 2
    assert append(cache, [1], start=10).shape[1] == 4
    assert append(cache, [5], start=20).shape[1] == 8
    assert row(cache, 0) == [0, 1, 10, 20, 21, 22, 23, 24]
    append(cache, [2], start=30)
    with pytest.raises(ContextLengthError, match=r"holds 10 .* 11 are needed"):
        append(cache, [1])


def test_unwritten_slots_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked weight of zero times NaN is NaN, so a slot must never hold what memory held before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        cache = KVCache(1, 2, 10, initial_length=4)
        assert append(cache, [3, 1]).isfinite().all()
        cache.select([1, 0, 1])
        assert append(cache, [2, 2, 2]).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ArgumentError):
        KVCache(1, 0, 5)
    with pytest.raises(ArgumentError, match="2 rows"):
        KVCache(1, 2, 5).reserve([1])


def test_memory_is_counted() -> None:
    cache = KVCache(1, 1, 8)
    assert cache.num_bytes == 0
    append(cache, [1])
    assert cache.num_bytes == 2 * 8 * K * E * 4


GROWING = """
from pathlib import Path
import torch
from audioflamingo.network.kv import KVStore

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

for _ in range(3):
    torch.ones(7 << 20)  # glibc takes blocks of up to 32 MiB from its heap once one was freed
store, new = KVStore(9, 20_000), torch.ones(1, 3, 32)
for layer in range(9):
    store.write(layer, new, new, torch.zeros(1, dtype=torch.long))
for buffer in (*store.keys, *store.values):
    buffer[:, 1:] = 2
before = resident() - store.num_bytes
for _ in range(6):
    store.resize(store.num_slots * 9 // 8)
    for buffer in (*store.keys, *store.values):
        assert buffer[:, 0].eq(1).all() and buffer[:, 1:20_000].eq(2).all() and buffer[:, -1].eq(0).all()
        buffer += 0
print((resident() - store.num_bytes - before) >> 20, store.num_bytes >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of resident pages")
def test_a_store_that_grows_leaves_no_holes_behind() -> None:
    """54 MiB of 267 were lost in the heap. It keeps what it held, and the rest is zeros."""
    output = subprocess.run(
        [sys.executable, "-c", GROWING], check=True, capture_output=True, text=True
    ).stdout
    lost, size = map(int, output.split())
    assert size > 200
    assert lost < 20
