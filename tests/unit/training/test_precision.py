"""What `precision: auto` means on which machine."""

from __future__ import annotations

import pytest
import torch

from audioflamingo.errors import ConfigError
from audioflamingo.training import precision


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
@pytest.mark.parametrize("uses_cpu", [True, False])
def test_what_is_named_is_taken(chosen: str, uses_cpu: bool) -> None:
    assert precision.resolve_precision(chosen, uses_cpu) == chosen


@pytest.mark.parametrize(("slowness", "expected"), [(0.5, "bfloat16"), (0.9, "float32"), (20.0, "float32")])
def test_a_cpu_takes_bfloat16_where_it_pays(
    slowness: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "slowness", lambda: slowness)
    assert precision.resolve_precision("auto", uses_cpu=True) == expected


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_without_bfloat16_takes_float16(
    has_bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert precision.resolve_precision("auto", uses_cpu=False) == expected


def test_float16_on_a_cpu_is_refused() -> None:
    assert precision.resolve_precision("float16", uses_cpu=False) == "float16"
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        precision.resolve_precision("float16", uses_cpu=True)
