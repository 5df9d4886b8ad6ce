"""The attention kernel against float64, and what holds to the bit: a query's answer is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from audioflamingo.errors import ArgumentError
from audioflamingo.kernels import cpu_attention as attention
from audioflamingo.kernels import native

Force = Callable[[str], None]
LEVELS = native.available()[1:]
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.skipif(not LEVELS, reason="the kernels were not built")


@dataclass
class Call:
    """Rows of one call: `(queries, keys, first slot)` each."""

    query: Tensor
    keys: Tensor
    values: Tensor
    rows: list[tuple[int, int, int]]
    is_causal: bool

    def run(self) -> Tensor:
        return attend(self.query, self.keys, self.values, self.rows, self.is_causal)

    def exact(self) -> Tensor:
        """softmax(Q K^T / 4) V in float64."""
        group = self.query.shape[1] // self.keys.shape[1]
        keys, values = (kv.double().repeat_interleave(group, dim=1) for kv in (self.keys, self.values))
        out, first = [], 0
        for num_queries, num_keys, slot in self.rows:
            q = self.query[first : first + num_queries].double()
            scores = torch.einsum("the,lhe->htl", q, keys[slot : slot + num_keys]) / 4
            if self.is_causal:
                seen = torch.ones(num_queries, num_keys).bool().tril(num_keys - num_queries)
                scores = scores.masked_fill(~seen, -torch.inf)
            out.append(torch.einsum("htl,lhe->the", scores.softmax(-1), values[slot : slot + num_keys]))
            first += num_queries
        return torch.cat(out)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, rows: list[tuple[int, int, int]], is_causal: bool
) -> Tensor:
    offsets = torch.tensor([0, *(row[0] for row in rows)]).cumsum(0)
    starts, ends = torch.tensor([row[2] for row in rows]), torch.tensor([row[1] for row in rows])
    return attention.attend_rows(
        query, keys, values, (offsets, starts, ends), scale=0.25, is_causal=is_causal
    )


def cases(dtype: torch.dtype, count: int) -> Iterator[Call]:
    """Rows with and without a past, stored in any order and with gaps that hold NaN; always the same ones."""
    generator = torch.Generator().manual_seed(count)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for case in range(count):
        key_heads, head_dim = draw(1, 3), (draw(1, 20), 64, 128)[case % 3]
        rows: list[tuple[int, int, int]] = []
        slot = 0
        for _ in range(draw(1, 4)):
            queries, past = (1, draw(2, 400))[draw(0, 1)], draw(0, 300)
            rows.append((queries, queries + past, slot + draw(0, 3)))
            slot = rows[-1][2] + rows[-1][1]
        rows = rows[::-1] if case % 2 else rows
        num_queries, heads = sum(row[0] for row in rows), key_heads * draw(1, 7)
        stored = [torch.full((key_heads, slot + 2, head_dim), torch.nan) for _ in range(2)]
        for tensor in stored:
            for _, keys, first in rows:
                tensor[:, first : first + keys] = torch.randn(key_heads, keys, head_dim, generator=generator)
        query = torch.randn(num_queries, heads, head_dim, generator=generator) * (1, 8)[case % 2]
        keys_values = [tensor.to(dtype).transpose(0, 1) for tensor in stored]
        yield Call(query.to(dtype), *keys_values, rows, bool(draw(0, 1)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_rows_give_what_float64_gives(level: str, dtype: torch.dtype, force: Force) -> None:
    force(level)
    for call in cases(dtype, 9):
        expected = call.exact()
        # Scores of up to 200 in float32; in bfloat16 the result is rounded to 8 bits, and the weights of pairs are.
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(call.run().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("level", LEVELS)
def test_a_query_does_not_depend_on_those_beside_it(level: str, force: Force) -> None:
    force(level)
    for call in cases(torch.float32, 6):
        together, first = call.run(), 0
        for queries, keys, slot in call.rows:
            last = first + queries - 1
            alone = attend(
                call.query[last : last + 1], call.keys, call.values, [(1, keys, slot)], call.is_causal
            )
            assert torch.equal(together[last], alone[0])
            first += queries


def test_scores_far_apart_and_not_finite() -> None:
    query = torch.tensor([[[300.0]], [[1.0]], [[torch.nan]]])
    keys = torch.tensor([[[300.0]], [[-300.0]], [[299.0]]])
    values = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    out = attend(query, keys, values, [(3, 3, 0)], is_causal=False).flatten()
    assert out[0] == 1
    torch.testing.assert_close(out[1], torch.tensor((1 + 3 * 2.718281828**-0.25) / (1 + 2.718281828**-0.25)))
    assert out[2].isnan()


def test_rows_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 2, 8)
    for rows, is_causal in (
        ([(4, 5, 0)], False),
        ([(4, 4, 1)], False),
        ([(4, 3, 0)], True),
        ([(3, 4, 0)], False),
    ):
        with pytest.raises(ArgumentError):
            attend(x, x, x, rows, is_causal)
    with pytest.raises(ArgumentError, match="do not fit"):
        attend(x, x[:, :, :4], x[:, :, :4], [(4, 4, 0)], is_causal=False)


def test_only_what_the_kernel_takes_runs_there(force: Force) -> None:
    x = torch.zeros(4, 2, 8)
    assert not attention.runs(x, x, x)  # gradients are on: a frozen part of what is trained, perhaps
    with torch.no_grad():
        assert attention.runs(x, x, x)
        assert not attention.runs(x.half(), x.half(), x.half())
        assert not attention.runs(x, x.transpose(1, 2), x)
        force("torch")
        assert not attention.runs(x, x, x)


@pytest.mark.parametrize(("ours", "is_faster"), [(1.0, True), (1.99, False), (3.0, False)])
def test_a_trial_leaves_torchs_kernel_only_for_a_gain(
    ours: float, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def takes(seconds: float) -> Callable[..., Tensor]:
        def run(query: Tensor, *_: object, **__: object) -> Tensor:
            clock[0] += seconds
            return query

        return run

    monkeypatch.setattr(attention.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(attention, "attend_rows", takes(ours))
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", takes(2.0))
    assert attention._wins.__wrapped__(torch.float32, 8, 64, False) is is_faster


def test_rows_of_a_like_length_share_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was one trial for all: 1500 queries that look everywhere took a kernel that is slower for them."""
    monkeypatch.setattr(attention, "_wins", lambda *call: call)
    lengths = {
        num_queries: attention.is_faster(torch.float32, 64, num_queries, True)
        for num_queries in (1, 64, 65, 128, 129, 750, 1500, 9000)
    }
    assert [call[2] for call in lengths.values()] == [64, 64, 128, 128, 256, 1024, 1024, 1024]
    assert attention.is_faster(torch.float32, 64, 64, False) != lengths[64]
