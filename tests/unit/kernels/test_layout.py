"""Packing: what goes in comes out, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from audioflamingo import kernels
from audioflamingo.errors import ArgumentError
from tests.support.kernel_weights import random_int4


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 63, 64, 130])
def test_int8_survives_packing(rows: int, columns: int) -> None:
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    packed = kernels.pack_int8(values)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == kernels.packed_int8_shape((rows, columns))
    assert torch.equal(kernels.unpack_int8(packed, (rows, columns)), values)


@pytest.mark.parametrize("rows", [1, 16, 19])
@pytest.mark.parametrize(
    ("columns", "group"), [(32, 32), (96, 32), (64, 64), (320, 64), (128, 128), (640, 128)]
)
def test_int4_survives_packing(rows: int, columns: int, group: int) -> None:
    values, scales = random_int4(rows, columns, group, torch.Generator().manual_seed(rows * columns))
    packed = kernels.pack_int4(values, scales, group)
    assert tuple(packed.shape) == kernels.packed_int4_shape((rows, columns), group)
    expected = values.int() * scales.int().repeat_interleave(group, dim=1)
    assert torch.equal(kernels.unpack_int4(packed, (rows, columns), group).int(), expected)


def test_int4_takes_about_half_a_byte_a_weight() -> None:
    blocks, width = kernels.packed_int4_shape((3584, 18944))
    assert blocks * width * 8 / (3584 * 18944) == pytest.approx(4 + 8 / 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_equals_the_rows_of_the_unpacked_table(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values, _ = random_int4(37, 192, 64, generator)
    scales = torch.rand(37, generator=generator)
    indices = torch.tensor([[0, 36, 5], [15, 16, 5]])
    packed = kernels.pack_int8(values)
    table = (values.float() * scales[:, None]).to(dtype)
    assert torch.equal(kernels.gather_int8(indices, packed, scales, (37, 192), dtype), table[indices])
    assert kernels.gather_int8(indices[:0], packed, scales, (37, 192), dtype).shape == (0, 3, 192)


def test_values_that_do_not_fit_are_refused() -> None:
    ones = torch.ones(2, 64, dtype=torch.int8)
    scales = torch.ones(2, 2, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="-128"):
        kernels.pack_int8(torch.full((1, 4), -128, dtype=torch.int8))
    with pytest.raises(ArgumentError, match="int8"):
        kernels.pack_int8(torch.ones(2, 4))
    with pytest.raises(ArgumentError, match=r"-8\.\.7"):
        kernels.pack_int4(ones * 8, scales, 32)
    with pytest.raises(ArgumentError, match=r"-127\.\.127"):
        kernels.pack_int4(ones * -8, scales * 16, 32)
    with pytest.raises(ArgumentError, match="shape"):
        kernels.pack_int4(ones, scales[:, :1], 32)
    with pytest.raises(ArgumentError, match="group=16"):
        kernels.packed_int4_shape((2, 64), 16)
    with pytest.raises(ArgumentError, match="divide"):
        kernels.packed_int4_shape((2, 96), 64)
    with pytest.raises(ArgumentError, match="inputs"):
        kernels.packed_int8_shape((2, 64)) and kernels.pack_int8(torch.zeros(1, 131_073, dtype=torch.int8))
    with pytest.raises(ArgumentError, match="packed"):
        kernels.unpack_int8(torch.zeros(1, 64, dtype=torch.uint8), (17, 4))
