"""Quantized checkpoints: written, loaded, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import audioflamingo
from audioflamingo.checkpoint.weights import find_tensors, is_packed
from audioflamingo.errors import (
    ArgumentError,
    AudioFlamingoError,
    AudioFlamingoWarning,
    CheckpointError,
    DeviceError,
)
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.quantization import QuantizationConfig, quantize, read_quantization
from audioflamingo.quantization.quantize_model import FLOAT_KEY, packed_layers
from audioflamingo.quantize_folder import quantize_checkpoint
from tests.support.checkpoint_folders import (
    INDEX,
    SINGLE,
    assert_equal_state,
    edit_json,
    edit_tensors,
    make_nvidia_folder,
)
from tests.support.tiny_model import make_batch, tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor

SCHEMES = ["int8", "int4", "fp8"]


def small_model(seed: int = 0) -> Any:
    return tiny_model(seed, hidden_size=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small model as it is, and in each scheme, each with its processor. Not to be changed."""
    root = tmp_path_factory.mktemp("folders")
    write_tiny_processor(root / "plain")
    small_model().save_pretrained(root / "plain")
    for scheme in SCHEMES:
        quantize_checkpoint(root / "plain", root / scheme, scheme)
    return {name: root / name for name in ("plain", *SCHEMES)}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the int4 folder, to be damaged."""
    return Path(shutil.copytree(folders["int4"], tmp_path / "copied"))


# All ways give the same model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_memory_while_loading_and_from_folder_to_folder(
    folders: dict[str, Path], scheme: str, tmp_path: Path
) -> None:
    expected = audioflamingo.quantize(small_model(), scheme)
    expected.save_pretrained(tmp_path)
    ways = {
        "folder": Model.from_pretrained(folders[scheme]),
        "saved": Model.from_pretrained(tmp_path, quantization=scheme),
        "while loading": Model.from_pretrained(folders["plain"], quantization=scheme, device_map="auto"),
    }
    inputs = make_batch([([300], 5)])
    for model in ways.values():
        assert_equal_state(model, expected)
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
        assert read_quantization(model.config) == QuantizationConfig(scheme)
        assert not model.training
    assert (folders[scheme] / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_shards_and_another_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(folders["plain"], tmp_path, "int4", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert (tmp_path / INDEX).exists()
    assert_equal_state(Model.from_pretrained(tmp_path), Model.from_pretrained(folders["int4"]))
    half = Model.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.dtype == half(**make_batch([([], 5)])).logits.dtype == torch.bfloat16
    expected = Model.from_pretrained(folders["int4"]).lm_head
    assert torch.equal(half.lm_head.scales, expected.scales)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float8_that_is_left_in_float_stays_float8(tmp_path: Path, scheme: str) -> None:
    model = small_model().half()
    name = "model.language_model.embed_tokens"
    weight = model.state_dict()[f"{name}.weight"]
    weight.copy_(weight.to(torch.float8_e4m3fn))
    model.config.extra[FLOAT_KEY] = [name]
    write_tiny_processor(tmp_path / "plain")
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", scheme)
    stored = find_tensors(tmp_path / "small")
    assert stored[f"{name}.weight"].dtype == "F8_E4M3"
    quantize(model, scheme).save_pretrained(tmp_path / "again")
    found = Model.from_pretrained(tmp_path / "small")
    assert torch.equal(found.state_dict()[f"{name}.weight"], weight)
    assert_equal_state(found, Model.from_pretrained(tmp_path / "again"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_packed_weights_are_mapped_and_aligned(folders: dict[str, Path]) -> None:
    """Nothing is copied, and kernels can read whole lines of 64 bytes."""
    model = Model.from_pretrained(folders["int4"])
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        [int(end, 16) for end in line[0].split("-")]
        for line in lines
        if line[-1].endswith(str(folders["int4"] / SINGLE))
    ]
    addresses = [tensor.data_ptr() for name, tensor in model.state_dict().items() if is_packed(name)]
    assert len(addresses) > 20
    assert all(any(start <= address < end for start, end in spans) for address in addresses)
    assert all(address % 64 == 0 for address in addresses)


def test_what_is_recorded(folders: dict[str, Path]) -> None:
    record = json.loads((folders["int4"] / "config.json").read_text())["quantization_config"]
    assert record == {
        "library": "audioflamingo",
        "version": 1,
        "scheme": "int4",
        "group_size": 64,
        "is_calibrated": False,
        "output_bits": 8,
    }
    dtypes = {name: tensor.dtype for name, tensor in find_tensors(folders["int4"]).items()}
    assert {dtype for name, dtype in dtypes.items() if is_packed(name)} == {"U8"}
    assert {dtype for name, dtype in dtypes.items() if not is_packed(name)} == {"F32"}


def test_the_processor_comes_along(folders: dict[str, Path]) -> None:
    ours, original = (AudioFlamingo3Processor.from_pretrained(folders[name]) for name in ("int8", "plain"))
    assert ours.chat_template == original.chat_template
    assert ours.tokenizer.decode([20, 30, 40]) == original.tokenizer.decode([20, 30, 40])


def test_without_a_processor_the_model_is_written_with_a_warning(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "plain")
    with pytest.warns(AudioFlamingoWarning, match="only the model is written"):
        quantize_checkpoint(tmp_path / "plain", tmp_path / "int8", "int8")
    assert_equal_state(
        Model.from_pretrained(tmp_path / "int8"), audioflamingo.quantize(small_model(), "int8")
    )


def test_nvidias_layout(tmp_path: Path) -> None:
    make_nvidia_folder(tmp_path / "nvidia", tiny_model())
    with pytest.warns(AudioFlamingoWarning, match="only the model is written"):
        quantize_checkpoint(tmp_path / "nvidia", tmp_path / "int8", "int8")
    expected = audioflamingo.quantize(tiny_model(), "int8")
    for folder in ("nvidia", "int8"):
        assert_equal_state(Model.from_pretrained(tmp_path / folder, quantization="int8"), expected)


def test_a_calibrated_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    prompts = [make_batch([([300], 5)])]
    quantize_checkpoint(folders["plain"], tmp_path, "int4", calibration=prompts)
    expected = audioflamingo.quantize(small_model(), "int4", calibration=prompts)
    model = Model.from_pretrained(tmp_path, quantization="int4")
    assert_equal_state(model, expected)
    Model.from_pretrained(tmp_path, quantization=read_quantization(model.config))
    with pytest.raises(ArgumentError, match="needs prompts"):
        Model.from_pretrained(folders["plain"], quantization=read_quantization(model.config))
    model.save_pretrained(tmp_path / "again")
    assert_equal_state(Model.from_pretrained(tmp_path / "again"), expected)
    edit_json(tmp_path / "config.json", quantization_config=QuantizationConfig("int4").to_dict())
    with pytest.raises(CheckpointError, match=r"unexpected: .*\.smoothing"):
        Model.from_pretrained(tmp_path)
    plain = Model.from_pretrained(folders["int4"])
    name = "model.language_model.layers.0.mlp.up_proj.packed_int4_g64"
    assert not torch.equal(plain.state_dict()[name], expected.state_dict()[name])


def test_progress_reaches_the_end(folders: dict[str, Path], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    quantize_checkpoint(
        folders["plain"], tmp_path, "int8", progress=lambda done, total: steps.append((done, total))
    )
    assert steps == sorted(steps)
    assert steps[0][0] == 0
    size = (tmp_path / SINGLE).stat().st_size
    assert {total for _, total in steps} <= set(range(size - 30_000, size))
    assert 0.9 * size < steps[-1][0] < size


# Refusals


@pytest.mark.parametrize(("name", "asked"), [("int8", "int4"), ("int4", "int8")])
def test_another_scheme_is_refused(folders: dict[str, Path], name: str, asked: str) -> None:
    with pytest.raises(CheckpointError, match=rf"is quantized as {name}.*quantization='{asked}'"):
        Model.from_pretrained(folders[name], quantization=asked)


def test_an_output_layer_in_four_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(folders["plain"], tmp_path / "out", "int8", output_bits=4)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["output_bits"] == 4
    )
    loaded = Model.from_pretrained(tmp_path / "out")
    assert str(read_quantization(loaded.config)) == "int8, output layer in 4 bits"
    formats = {name: layer.format.bits for name, layer in packed_layers(loaded).items()}
    assert [name for name, bits in formats.items() if bits == 4] == ["lm_head"]
    expected = audioflamingo.quantize(Model.from_pretrained(folders["plain"]), "int8", output_bits=4)
    assert torch.equal(loaded.lm_head.packed, expected.lm_head.packed)


def test_another_group_size_is_refused(folders: dict[str, Path]) -> None:
    Model.from_pretrained(folders["int4"], quantization=QuantizationConfig("int4", 64))
    with pytest.raises(CheckpointError, match="quantized as int4, group 64"):
        Model.from_pretrained(folders["int4"], quantization=QuantizationConfig("int4", 32))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"version": 2}, r"in format 2, this version reads up to 1: update audioflamingo"),
        ({"version": None}, "version None"),
        ({"library": None, "quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes', which"),
        ({"scheme": "int3"}, "'int3' does not exist; choose from"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"output_bits": 5}, "output_bits must be one of"),
        ({"output_bits": 4}, "do not fit its configuration.*missing: .*lm_head.packed_int4_g32"),
        ({"group_size": 32}, "do not fit its configuration.*missing: .*packed_int4_g32"),
        ({"scheme": "int8", "group_size": None}, "do not fit its configuration.*missing: .*packed_int8"),
    ],
)
def test_records_that_do_not_fit_are_refused(copied: Path, record: dict[str, Any], message: str) -> None:
    before = json.loads((copied / "config.json").read_text())["quantization_config"]
    edit_json(copied / "config.json", quantization_config={**before, **record})
    with pytest.raises(CheckpointError, match=message):
        Model.from_pretrained(copied)


@pytest.mark.parametrize("record", [None, "int4"])
def test_a_lost_record_is_refused(copied: Path, record: Any) -> None:
    edit_json(copied / "config.json", quantization_config=record)
    with pytest.raises(CheckpointError, match=r"missing.*unexpected|must be an object"):
        Model.from_pretrained(copied)


def test_a_record_beside_plain_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["plain"], tmp_path / "claims")
    edit_json(tmp_path / "claims/config.json", quantization_config=QuantizationConfig("int8").to_dict())
    with pytest.raises(CheckpointError, match=r"missing: .*packed"):
        Model.from_pretrained(tmp_path / "claims")


def test_integers_of_another_dtype_are_refused(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.lm_head.packed_int8"] = tensors["language_model.lm_head.packed_int8"].float()

    edit_tensors(copied, change)
    with pytest.raises(CheckpointError, match=r"lm_head\.packed_int8 \(F32\)"):
        Model.from_pretrained(copied)


def test_weights_that_are_no_numbers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["audio_tower.layers.1.fc1.weight"][3, 4] = torch.inf

    shutil.copytree(folders["plain"], tmp_path / "broken")
    edit_tensors(tmp_path / "broken", change)
    with pytest.raises(CheckpointError, match=r"audio_tower\.layers\.1\.fc1 hold NaN or infinity"):
        Model.from_pretrained(tmp_path / "broken", quantization="int8")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        quantize_checkpoint(tmp_path / "broken", tmp_path / "out", "int8")
    assert list((tmp_path / "out").iterdir()) == []


def test_other_devices_are_refused(folders: dict[str, Path]) -> None:
    Model.from_pretrained(folders["int8"], device_map={"": "cpu"})
    with pytest.raises(DeviceError):
        Model.from_pretrained(folders["int8"], device_map="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "'int3' does not exist"),
        ({"scheme": "int4", "group_size": 64}, r"64 does not divide the 96 inputs of .*down_proj; 32 would"),
        ({"scheme": "int8", "max_shard_size": "many"}, "max_shard_size"),
    ],
)
def test_wrong_arguments_write_nothing(
    folders: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        quantize_checkpoint(folders["plain"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_or_is_the_original_is_not_written_over(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_checkpoint(folders["int8"], folders["plain"], "int4")
    with pytest.raises(ArgumentError, match="is the original checkpoint"):
        quantize_checkpoint(folders["plain"], folders["plain"], "int4")
    assert_equal_state(Model.from_pretrained(folders["plain"]), small_model())


def test_a_full_disk_leaves_the_old_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """A real failing write: for a while the process may not write files of more than 100 kB."""
    resource = pytest.importorskip("resource")
    old = Path(shutil.copytree(folders["int8"], tmp_path / "old"))
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save to .*File too large"):
            quantize_checkpoint(folders["plain"], old, "int4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_new_scheme_replaces_an_older_one(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(folders["plain"], tmp_path, "int8", max_shard_size="50KB")
    quantize_checkpoint(folders["plain"], tmp_path, "int4")
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == [SINGLE]
    assert_equal_state(Model.from_pretrained(tmp_path), Model.from_pretrained(folders["int4"]))


def test_every_refusal_is_one_of_ours(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AudioFlamingoError, match="is a file"):
        quantize_checkpoint(folders["plain"], tmp_path / "file", "int4")
