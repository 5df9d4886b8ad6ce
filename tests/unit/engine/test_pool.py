"""The pool hands out slots and gets them all back; kept sequences are found by their beginning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audioflamingo.engine.kv_pool import KVPool, Span
from audioflamingo.engine.prefix_cache import MIN_REUSED, PrefixCache, common_prefix
from audioflamingo.errors import ContextLengthError


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_spans_never_overlap_and_everything_comes_back(sizes: list[int], random: object) -> None:
    pool = KVPool(1, 100)
    spans: list[Span] = []
    for size in sizes:
        span = pool.allocate(size)
        if span is None:
            victim = spans.pop(random.randrange(len(spans))) if spans else None  # type: ignore[attr-defined]
            if victim is not None:
                pool.free(victim)
            continue
        spans.append(span)
        slots = [slot for s in spans for slot in range(s.start, s.start + s.num_slots)]
        assert len(slots) == len(set(slots)) == 100 - pool.num_free
    for span in spans:
        pool.free(span)
    assert pool.num_free == 100
    assert pool.allocate(100) is not None


def test_rows_read_what_they_wrote_wherever_they_lie() -> None:
    pool = KVPool(1, 20)
    first, second = pool.allocate(8), pool.allocate(8)
    assert first is not None
    assert second is not None
    keys = torch.arange(5.0).view(5, 1, 1).expand(5, 2, 4)
    buffers = pool.view([second, first], [3, 2], keys.device).write(0, keys, -keys)
    second.length, first.length = 3, 2
    found, other = stored(buffers[0], second), stored(buffers[0], first)
    assert found.shape == (2, 3, 4)
    assert found[0, :, 0].tolist() == [0, 1, 2]
    assert other[1, :, 3].tolist() == [3, 4]
    assert stored(buffers[1], first)[1, :, 3].tolist() == [-3, -4]
    target = pool.allocate(4)
    assert target is not None
    pool.copy(second, target, 2)
    assert target.length == 2
    buffer, _ = pool.view([target], [1], keys.device).write(0, keys[:1] + 9, keys[:1])
    target.length = 3
    assert stored(buffer, target)[0, :, 0].tolist() == [0, 1, 9]
    with pytest.raises(ContextLengthError):
        pool.view([target], [2], keys.device)


def test_a_pool_grows_at_its_end_and_nothing_moves() -> None:
    pool = KVPool(1, 6)
    first, second = pool.allocate(2), pool.allocate(4)
    assert first is not None
    assert second is not None
    keys = torch.arange(2.0).view(2, 1, 1)
    pool.view([first], [2], keys.device).write(0, keys, -keys)
    first.length = 2
    assert pool.allocate(1) is None
    pool.free(second)
    pool.grow(3)
    assert (pool.num_slots, pool.num_free) == (9, 7)
    assert pool.allocate(7) is not None, "new slots join the free ones before them"
    assert pool.store.keys[0] is not None
    assert stored(pool.store.keys[0], first)[0, :, 0].tolist() == [0, 1]


def test_a_pool_that_grows_by_itself_takes_little_more_than_it_needs() -> None:
    """Nothing more before anything is stored; then an eighth at least, so that few small requests move it rarely."""
    pool = KVPool(1, 0, grows=True)
    spans = [pool.allocate_new(100) for _ in range(8)]
    assert pool.num_slots == 800
    assert spans[0] is not None
    keys = torch.ones(1, 1, 1)
    pool.view([spans[0]], [1], keys.device).write(0, keys, keys)
    assert pool.allocate_new(10) is not None
    assert (pool.num_slots, pool.num_free) == (900, 90)
    assert pool.allocate_new(300) is not None
    assert pool.num_slots == 900 - 90 + 300


def stored(buffer: torch.Tensor, span: Span) -> torch.Tensor:
    """The tokens of a span, `(K, length, E)`."""
    return buffer[:, span.start : span.start + span.length]


def ids(*parts: tuple[int, int]) -> np.ndarray:
    """Identities: so many of each number."""
    return np.concatenate([np.full(count, number, np.int64) for number, count in parts])


def kept(cache: PrefixCache, pool: KVPool, identity: np.ndarray) -> Span:
    span = cache.allocate(len(identity) + 5, None)
    assert span is not None
    span.length = len(identity)
    cache.keep(identity, span)
    return span


def test_the_longest_beginning_is_found() -> None:
    pool = KVPool(1, 1000)
    cache = PrefixCache(pool)
    short = kept(cache, pool, ids((1, 20), (2, 5)))
    long = kept(cache, pool, ids((1, 20), (3, 50)))
    assert common_prefix(ids((1, 3)), ids((1, 2), (4, 1))) == 2
    assert cache.find(ids((1, 20), (3, 10), (4, 9))) == (long, 30)
    assert cache.find(ids((1, 20), (2, 9))) == (short, 25)
    assert cache.find(ids((1, MIN_REUSED - 1), (9, 9))) == (None, 0)
    assert cache.num_slots + pool.num_free == 1000


def test_what_another_holds_is_not_kept_twice() -> None:
    pool = KVPool(1, 1000)
    cache = PrefixCache(pool)
    kept(cache, pool, ids((1, 20)))
    kept(cache, pool, ids((1, 40)))  # holds the first one
    kept(cache, pool, ids((1, 30)))  # held by the second one
    assert len(cache) == 1
    assert cache.num_slots == 40
    assert pool.num_free == 960


def test_the_least_recently_used_makes_room_and_the_wanted_one_last() -> None:
    pool = KVPool(1, 100)
    cache = PrefixCache(pool)
    kept(cache, pool, ids((1, 30)))
    second = kept(cache, pool, ids((2, 30)))
    cache.find(ids((1, 30)))
    assert cache.allocate(60, None) is not None
    assert cache.find(ids((2, 30))) == (None, 0)
    assert cache.find(ids((1, 30)))[1] == 30
    assert second.num_slots == 0
    wanted, _ = cache.find(ids((1, 30)))
    assert cache.allocate(50, wanted) is None  # running sequences leave no room, whatever is dropped
    assert len(cache) == 0
