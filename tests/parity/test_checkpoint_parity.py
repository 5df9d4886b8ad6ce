"""Checkpoints go to transformers and back without a changed bit, in every layout and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import audioflamingo
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from tests.support.checkpoint_folders import SINGLE, assert_equal_state, make_nvidia_folder
from tests.support.tiny_model import make_batch, tiny_model, tiny_reference

transformers = pytest.importorskip("transformers")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest difference of logits, which reach 1.1: about twice what was measured (4e-7, 1.5e-3, 1.1e-2). In the
# half types both differ from float32 by as much as from each other.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 0.025}


def load_reference(folder: Path, **options: Any) -> Any:
    return transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, **options).eval()


def assert_equal_logits(ours: Any, reference: Any) -> None:
    """Logits of two rows, one of them padded, with audio of one and of two windows."""
    batch = make_batch([([3000, 700], 12), ([300], 5)])
    dtype = ours.dtype
    with torch.no_grad():
        got = ours(**batch).logits
        expected = reference(**{**batch, "input_features": batch["input_features"].to(dtype)}).logits
    is_real = batch["attention_mask"].bool()
    assert got.dtype == dtype
    torch.testing.assert_close(got[is_real], expected[is_real], atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_transformers_saves_loads_here(tmp_path: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    reference = tiny_reference().to(dtype)
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / SINGLE).exists() == (max_shard_size == "5GB")
    ours = Model.from_pretrained(tmp_path)
    assert ours.dtype == dtype
    assert_equal_state(ours, reference)
    assert_equal_logits(ours, reference)


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_here_loads_in_transformers(
    tmp_path: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    ours = tiny_model().to(dtype)
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    reference = load_reference(tmp_path)
    assert reference.dtype == dtype
    assert_equal_state(reference, ours)
    assert_equal_logits(ours, reference)


def test_same_file_names_and_tensor_names(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    tiny_reference().save_pretrained(tmp_path / "theirs", max_shard_size="100KB")

    def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.metadata()["format"] == "pt"
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found |= {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
        return found

    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")
    plain = {path.name for path in (tmp_path / "theirs").iterdir() if not path.name.startswith("model-")}
    assert {
        path.name for path in (tmp_path / "ours").iterdir() if not path.name.startswith("model-")
    } == plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_in_memory_names_load_here(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = tiny_reference().to(dtype)
    reference.save_pretrained(tmp_path)
    save_file(reference.state_dict(), tmp_path / SINGLE, {"format": "pt"})
    assert_equal_state(Model.from_pretrained(tmp_path), reference)


def test_nvidias_layout_gives_the_references_logits(tmp_path: Path) -> None:
    reference = tiny_reference()
    make_nvidia_folder(tmp_path, reference)
    ours = Model.from_pretrained(tmp_path)
    assert_equal_state(ours, reference)
    assert_equal_logits(ours, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_to_another_dtype_rounds_as_transformers_does(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert_equal_state(Model.from_pretrained(tmp_path, dtype=dtype), load_reference(tmp_path, dtype=dtype))


def test_configurations_survive_both_ways(tmp_path: Path) -> None:
    """Ours, saved by transformers, loaded and saved here again: transformers reads equal configurations."""
    tiny_model().save_pretrained(tmp_path / "ours")
    load_reference(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    Model.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    theirs, again = (transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("theirs", "again"))
    assert again.to_dict() == {**theirs.to_dict(), "_name_or_path": again.to_dict().get("_name_or_path")}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_transformers_refuses_a_quantized_folder(scheme: str, tmp_path: Path) -> None:
    """Under another name of the record it would load the folder, with random weights."""
    audioflamingo.quantize(tiny_model(hidden_size=64), scheme).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization config"):
        load_reference(tmp_path)
