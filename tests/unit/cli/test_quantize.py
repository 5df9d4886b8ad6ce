"""`af3 quantize`, and quantized models in the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import audioflamingo
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from tests.support.audio_files import encode, tone
from tests.support.checkpoint_folders import assert_equal_state
from tests.support.cli_runs import af3
from tests.support.tiny_model import tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_tiny_processor(folder)
    tiny_model(hidden_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.wav"
    path.write_bytes(encode(tone(1.0), 16000, "wav"))
    return path


def test_a_quantized_copy_answers(plain: Path, clip: Path, tmp_path: Path) -> None:
    result = af3("quantize", plain, tmp_path / "int4", "--scheme", "int4")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "of weights, int4" in result.stderr
    question = ("ask", clip, "What is this?", "--max-new-tokens", 5, "--model")
    answer = af3(*question, tmp_path / "int4")
    assert answer.exit_code == 0
    assert answer.stdout == af3(*question, plain, "--quantization", "int4").stdout
    assert af3(*question, plain, "--quantization", "int8", "--verbose").stderr.count("int8") == 1


def test_calibrated_on_clips(plain: Path, clip: Path, tmp_path: Path) -> None:
    result = af3("quantize", plain, tmp_path / "out", "--scheme", "int4", "--calibrate", clip.parent, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    model = Model.from_pretrained(tmp_path / "out")
    with pytest.raises(AssertionError):
        assert_equal_state(model, audioflamingo.quantize(tiny_model(hidden_size=64), "int4"))


def test_info_tells_the_truth(plain: Path, tmp_path: Path) -> None:
    af3("quantize", plain, tmp_path / "int4", "--scheme", "int4")
    text = af3("info", tmp_path / "int4").stdout
    assert "quantized  int4, group 64" in text
    before, after = (json.loads(af3("info", f, "--json").stdout) for f in (plain, tmp_path / "int4"))
    assert (before["quantization"], after["quantization"]) == (None, "int4, group 64")
    for key in ("parameters", "weight_bytes", "architecture"):
        assert before[key] == after[key]
    stored = after["stored"]["parameters_by_dtype"]
    assert stored.keys() == {"int4", "int8", "float32"}
    weights = [size for name, size in after["files"].items() if name.endswith(".safetensors")]
    model = Model.from_pretrained(tmp_path / "int4")
    assert 0 < sum(weights) - model.get_memory_footprint() < 30_000  # the header
    half = model.bfloat16().get_memory_footprint()
    assert half == after["weight_bytes"]["int4"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--scheme", "int3"], 2, "int3"),
        (["--scheme", "int4", "--group-size", "48"], 1, "group_size must be one of"),
        (["--scheme", "int8", "--group-size", "64"], 1, "belongs to 'int4'"),
        (["--scheme", "int8", "--calibrate", "absent.wav"], 1, "absent.wav"),
    ],
)
def test_mistakes(plain: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = af3("quantize", plain, tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_scheme_than_the_folders(plain: Path, clip: Path, tmp_path: Path) -> None:
    af3("quantize", plain, tmp_path / "int8", "--scheme", "int8")
    for command in (("transcribe", clip), ("ask", clip, "What?"), ("chat", clip)):
        result = af3(*command, "--model", tmp_path / "int8", "--quantization", "int4")
        assert result.exit_code == 1
        assert "is quantized as int8" in result.stderr
