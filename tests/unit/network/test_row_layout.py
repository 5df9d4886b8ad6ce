"""Which rows attend together, and that every way to attend gives what each row gives alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from audioflamingo.network.attention import attend_packed, eager_attention
from audioflamingo.network.kv import KVStore, KVView
from audioflamingo.network.row_layout import PackedLayout, Span, causal_mask

CPU = torch.device("cpu")
H, K, E = 6, 2, 4
SCALE = E**-0.5


def sizes(layout: PackedLayout) -> list[int]:
    """Rows of each call."""
    return [len(group.ends) for group in layout.groups]


@pytest.mark.parametrize(
    ("spans", "num_new", "expected"),
    [
        ([(0, 9, 4), (9, 9, 4), (18, 9, 4)], [1, 1, 1], [3]),
        ([(0, 9, 4), (9, 9, 4), (18, 9, 4)], [3, 3, 3], [3]),
        ([(0, 9, 4), (9, 9, 6), (18, 9, 3)], [1, 1, 1], [3]),  # one masked call
        ([(0, 9, 4), (9, 9, 6), (18, 9, 3)], [2, 2, 2], [1, 1, 1]),
        ([(0, 9, 4), (9, 9, 4), (18, 9, 3)], [2, 2, 2], [2, 1]),
        ([(0, 9, 4), (9, 9, 4), (20, 9, 4)], [1, 1, 1], [2, 1]),  # not evenly spaced
        ([(18, 9, 4), (9, 9, 4), (0, 9, 4)], [1, 1, 1], [1, 1, 1]),  # backwards
        ([(0, 5, 4), (9, 9, 6), (18, 9, 3)], [1, 1, 1], [1, 2]),  # the first has no seven slots
        ([(0, 90, 1), (90, 90, 1), (180, 90, 80)], [1, 1, 1], [2, 1]),  # too much to mask
        ([(0, 9, 4), (9, 9, 4), (18, 40, 0)], [1, 1, 30], [2, 1]),  # two answers and a prompt
    ],
)
def test_rows_attend_together_where_they_can(
    spans: list[tuple[int, int, int]], num_new: list[int], expected: list[int]
) -> None:
    starts, room, lengths = zip(*spans, strict=True)
    assert sizes(PackedLayout.of(starts, lengths, num_new, CPU, room=room)) == expected


def test_without_a_store_equal_rows_are_one_call() -> None:
    assert sizes(PackedLayout.packed([4, 4, 4], CPU)) == [3]
    assert sizes(PackedLayout.packed([4, 4, 5], CPU)) == [2, 1]


def reference(
    query: Tensor, keys: Tensor, values: Tensor, layout: PackedLayout
) -> tuple[Tensor, list[Tensor]]:
    """Row by row, by the formula; the output `(N, H, E)` and the weights."""
    assert layout.num_new is not None
    outputs, weights = [], []
    rows = zip(query.split(layout.num_new), layout.starts.tolist(), layout.ends.tolist(), strict=True)
    for q, start, end in rows:
        key, value = keys[None, :, start : start + end], values[None, :, start : start + end]
        out, w = eager_attention(q.transpose(0, 1)[None], key, value, causal_mask(len(q), end, CPU), SCALE)
        outputs.append(out[0].transpose(0, 1))
        weights.append(w)
    return torch.cat(outputs), weights


@pytest.mark.parametrize("seed", range(12))
def test_packed_attention_equals_each_row_alone(seed: int) -> None:
    """Spans of random size, filled at random, in the order in which they lie or another."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_rows = rng.randint(1, 6)
    rooms = [rng.randint(4, 20)] * num_rows if seed % 2 else [rng.randint(4, 20) for _ in range(num_rows)]
    past = [rng.randint(0, room - 3) for room in rooms]
    num_new = [rng.choice([1, 1, 3]) for _ in rooms] if seed % 3 else [1] * num_rows
    firsts = [sum(rooms[:row]) for row in range(num_rows)]
    order = rng.sample(range(num_rows), num_rows) if seed % 4 == 3 else list(range(num_rows))
    rooms, past, num_new, firsts = ([values[i] for i in order] for values in (rooms, past, num_new, firsts))
    layout = PackedLayout.of(firsts, past, num_new, CPU, room=rooms)
    store = KVStore(1, sum(rooms) + 3)
    old = torch.cat([torch.arange(first, first + n) for first, n in zip(firsts, past, strict=True)])
    store.write(0, torch.randn(len(old), K, E), torch.randn(len(old), K, E), old)
    count = sum(num_new)
    keys, values = KVView(store, layout).write(0, torch.randn(count, K, E), torch.randn(count, K, E))
    query = torch.randn(count, H, E)
    expected, expected_weights = reference(query, keys, values, layout)
    for implementation in ("eager", "sdpa"):
        out, weights = attend_packed(query, keys, values, layout, implementation=implementation, scale=SCALE)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        assert (weights is None) == (implementation == "sdpa")
        for got, want in zip(weights or expected_weights, expected_weights, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_captured", [False, True])
def test_a_row_that_is_not_finite_leaves_the_others_alone(is_captured: bool) -> None:
    """A masked weight of zero times another row's NaN is NaN: no row may look past its own span."""
    spans = [Span(0, 8, 3), Span(8, 8, 7), Span(16, 5, 4), Span(21, 8, 2)]
    store = KVStore(1, 29)
    store.write(0, torch.randn(29, K, E), torch.randn(29, K, E), torch.arange(29))
    for buffer in (store.keys[0], store.values[0]):
        assert buffer is not None
        buffer[:, 8:16] = torch.nan
    starts, rooms, lengths = zip(*((s.start, s.num_slots, s.length) for s in spans), strict=True)
    layout = PackedLayout.of(starts, lengths, [1] * 4, CPU, room=rooms)
    if is_captured:
        layout = PackedLayout.of_step(spans, window=20, device=CPU)
    new = torch.randn(4, K, E)
    keys, values = KVView(store, layout).write(0, new, new)
    out, _ = attend_packed(torch.randn(4, H, E), keys, values, layout, implementation="sdpa", scale=SCALE)
    assert out.isfinite().all(-1).all(-1).tolist() == [True, False, True, True]
    store.clear(spans[1])
    keys, values = KVView(store, layout).write(0, new, new)
    out, _ = attend_packed(torch.randn(4, H, E), keys, values, layout, implementation="sdpa", scale=SCALE)
    assert out.isfinite().all()


def test_a_store_moves_tokens_that_overlap_and_copies_spans() -> None:
    store = KVStore(2, 10)
    numbers = torch.arange(4.0).view(4, 1, 1)
    for layer in range(2):
        store.write(layer, numbers, -numbers, torch.arange(4))
    store.move(torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5]))
    store.copy(Span(2, 4, 4), Span(7, 3), 3)
    for keys, values in zip(store.keys, store.values, strict=True):
        assert keys is not None
        assert values is not None
        assert keys[0, :, 0].tolist() == [0, 1, 0, 1, 2, 3, 0, 0, 1, 2]
        assert torch.equal(values, -keys)
    size = store.num_bytes
    store.resize(20)
    assert store.num_bytes == 2 * size
    assert store.keys[1] is not None
    assert store.keys[1][0, :, 0].tolist() == [0, 1, 0, 1, 2, 3, 0, 0, 1, 2] + [0] * 10
