"""Rounding: what the integers may be, and that the searches are worth their time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from audioflamingo.quantization.rounding import Int4Weights, Int8Weights, round_int4, round_int8


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def value_of(rounded: Int8Weights | Int4Weights) -> Tensor:
    values = rounded.values.float()
    if isinstance(rounded, Int4Weights):
        num_groups = rounded.group_scales.shape[1]
        groups = values.view(len(values), num_groups, -1) * rounded.group_scales[..., None]
        assert groups.abs().max() <= 127
        values = groups.flatten(1)
    return values * rounded.scales[:, None]


def relative_error(rounded: Int8Weights | Int4Weights, weight: Tensor, h: Tensor | None = None) -> float:
    h = torch.ones(weight.shape[1]) if h is None else h
    weight = weight.double()
    error = ((value_of(rounded) - weight) ** 2 * h).sum() / (weight**2 * h).sum()
    return float(error.sqrt())


def min_max_error(weight: Tensor, group: int, lowest: int, highest: int) -> float:
    """Error of the plain way: the scale of each group is what makes its largest weight fit."""
    groups = weight.unflatten(1, (-1, group))
    widths = torch.maximum(groups.amin(2, keepdim=True) / lowest, groups.amax(2, keepdim=True) / highest)
    rounded = ((groups / widths).round().clamp(lowest, highest) * widths).flatten(1)
    return float((rounded - weight).norm() / weight.norm())


def test_int8_of_gaussian_weights_is_as_good_as_min_max() -> None:
    weight = gaussian(40, 512)
    rounded = round_int8(weight)
    assert rounded.values.dtype == torch.int8
    assert rounded.values.abs().max() <= 127
    assert relative_error(rounded, weight) <= min_max_error(weight, 512, -127, 127)


@pytest.mark.parametrize(("group", "gain"), [(32, 0.975), (64, 0.96), (128, 0.94)])
def test_int4_beats_min_max_with_float_scales(group: int, gain: float) -> None:
    """Although its group scales are whole numbers."""
    weight = gaussian(64, 512)
    rounded = round_int4(weight, group)
    assert rounded.group_scales.dtype == torch.uint8
    assert (int(rounded.values.min()), int(rounded.values.max())) == (-8, 7)
    assert relative_error(rounded, weight) < gain * min_max_error(weight, group, -8, 7)


def test_the_clip_is_searched_for() -> None:
    """A row with one stray weight: fitting that one would round the rest coarsely."""
    weight = gaussian(4, 16384)
    weight[:, 7] = 12.0
    assert relative_error(round_int8(weight), weight) < 0.97 * min_max_error(weight, 16384, -127, 127)


@pytest.mark.parametrize("round_", [round_int8, lambda w: round_int4(w, 32)])
def test_integers_come_back_as_they_were(round_: Callable[[Tensor], Int8Weights | Int4Weights]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-7, 8, (16, 128), generator=generator).float()
    values[:, ::32] = 7.0
    weight = values * 18 * torch.logspace(-4, 3, 16)[:, None]
    if round_ is round_int8:
        weight[:, 0] *= 127 / (7 * 18)
    torch.testing.assert_close(value_of(round_(weight)), weight)


@pytest.mark.parametrize("round_", [round_int8, lambda w, h=None: round_int4(w, 32, h)])
def test_importance_moves_the_error_to_where_it_matters_less(
    round_: Callable[..., Int8Weights | Int4Weights],
) -> None:
    weight, importance = gaussian(32, 256), torch.ones(256)
    weight[:, ::16] *= 4  # the widest inputs ...
    importance[::16] = 1e-3  # ... matter least
    plain = relative_error(round_(weight), weight, importance)
    assert relative_error(round_(weight, importance), weight, importance) < 0.9 * plain


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e30])
def test_sizes_at_the_ends_of_float32(size: float) -> None:
    weight = gaussian(3, 64) * size
    weight[1] = 0
    for rounded in (round_int8(weight), round_int4(weight, 32)):
        assert rounded.scales.isfinite().all()
        assert value_of(rounded)[1].abs().max() == 0
        if size >= 1e-30:
            assert relative_error(rounded, weight) < 0.1
