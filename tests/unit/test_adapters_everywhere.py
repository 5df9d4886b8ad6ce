"""Adapters in transcription, evaluation and their commands: what answers there is what answers in `generate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor
from audioflamingo.cli.cluster_job import ClusterJob, _describe, _load
from audioflamingo.cli.flags import ScreenOptions
from audioflamingo.cli.model_loading import AdaptedModelOptions
from audioflamingo.corpus import ClusterOptions, CorpusFile
from audioflamingo.errors import ArgumentError
from audioflamingo.evaluation import evaluate
from audioflamingo.transcription import TranscriptionOptions, transcribe
from tests.support.adapter_folders import save_adapter
from tests.support.cli_runs import af3, write_tiny_model
from tests.support.tiny_model import tiny_reference
from tests.support.tiny_training import write_clip, write_dataset

pytest.importorskip("peft", reason="needs peft")
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "use_vad": False, "retry_ngram_size": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    save_adapter(folder / "mine", tiny_reference(), lora_alpha=60)
    save_adapter(folder / "other", tiny_reference(), 1, lora_alpha=60)
    write_clip(folder / "clip.wav", 2.0, 0)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForConditionalGeneration.from_pretrained(folder)
    model.load_adapter(folder / "mine", "mine")
    return model, AutoProcessor.from_pretrained(folder)


def heard(model: Any, processor: Any, folder: Path, adapter: str | None) -> str:
    inputs = processor.apply_transcription_request(str(folder / "clip.wav"))
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, adapter=adapter)
    new = output[0, inputs.input_ids.shape[1] :]
    return processor.decode(new, skip_special_tokens=True, strip_prefix=True)


def test_transcripts(loaded: tuple[Any, Any], folder: Path) -> None:
    expected = {name: heard(*loaded, folder, name) for name in (None, "mine")}
    assert expected["mine"] != expected[None]
    for name, text in expected.items():
        (segment,) = transcribe(*loaded, str(folder / "clip.wav"), adapter=name, **OPTIONS)
        assert segment.text == text
    with pytest.raises(ArgumentError, match="no adapter 'mne'; loaded: 'mine'"):
        list(transcribe(*loaded, str(folder / "clip.wav"), adapter="mne"))


def test_the_command(loaded: tuple[Any, Any], folder: Path) -> None:
    command = ("transcribe", folder / "clip.wav", "--model", folder, "--max-new-tokens", 8, "--no-vad", "-q")
    result = af3(*command, "--adapter", folder / "mine")
    assert result.exit_code == 0, result.stderr
    assert " ".join(result.stdout.split()) == " ".join(heard(*loaded, folder, "mine").split())
    result = af3(*command, "--adapter", folder)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "holds no adapter" in result.stderr


def test_evaluation_tells_adapters_apart(loaded: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("jiwer", reason="needs jiwer")
    data = write_dataset(tmp_path / "data", num_rows=2)
    answers = {
        name: [item.answer for item in evaluate(*loaded, str(data), max_new_tokens=8, adapter=name).items]
        for name in (None, "mine")
    }
    assert answers["mine"] != answers[None]
    command = ("evaluate", data, "-o", tmp_path / "out", "--model", folder, "--max-new-tokens", 8, "-q")
    for _ in range(2):  # goes on where it was
        result = af3(*command, "--adapter", folder / "mine")
        assert result.exit_code == 0, result.stderr
    lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["answer"] for line in lines) == sorted(answers["mine"])
    for other in (("--adapter", folder / "other"), ()):
        result = af3(*command, *other)
        assert result.exit_code == 1
        assert "holds another run" in result.stderr


def test_a_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to the workers: a folder by its whole path, and what tells one adapter from another."""
    model = AdaptedModelOptions(str(folder), "cpu")
    described = {
        name: _describe(dataclasses.replace(model, adapter=str(folder / name))) for name in ("mine", "other")
    }
    assert described["mine"]["model_sha256"] == described["other"]["model_sha256"]
    assert described["mine"]["adapter_sha256"] != described["other"]["adapter_sha256"]
    assert "adapter_sha256" not in _describe(model)
    sent: dict[str, Any] = {}

    def record(files: Any, output_dir: Any, load: Any, **rest: Any) -> Any:
        sent.update(rest, load=load)
        raise KeyboardInterrupt

    monkeypatch.setattr("audioflamingo.cli.cluster_job.transcribe_corpus", record)
    monkeypatch.chdir(folder)
    job = ClusterJob([CorpusFile("clip.wav", str(folder / "clip.wav"))], folder, ScreenOptions(quiet=True))
    with pytest.raises(BaseException, match="130"):
        job.run(dataclasses.replace(model, adapter="mine"), TranscriptionOptions(), ClusterOptions(), False)
    assert sent["load"].func is _load
    assert sent["load"].args[0].adapter == str(folder / "mine")
    loaded, _ = sent["load"]()
    assert list(loaded.adapters) == [sent["options"].adapter]
