"""A corpus and an evaluation on a real Ray cluster of two nodes: a killed worker, Ctrl-C, going on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.cli import cluster_job
from audioflamingo.cli.model_loading import ModelOptions, load
from audioflamingo.corpus import CorpusFile
from audioflamingo.corpus.records import transcribe_files
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from tests.support.adapter_folders import save_adapter
from tests.support.cli_runs import af3, af3_process, write_tiny_model
from tests.support.tiny_model import tiny_reference
from tests.support.tiny_training import conversation

pytest.importorskip("ray", reason="needs Ray: pip install 'audioflamingo[ray]'")

DATA = Path(__file__).parents[2] / "data"
NUM_FILES = 24
BROKEN = "07.wav"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes, each with room for one worker."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that differ in length and loudness, and one that is broken."""
    folder = tmp_path_factory.mktemp("corpus")
    speech = load_audio(DATA / "directory_prompt.flac")
    for number in range(NUM_FILES):
        waveform = speech[: SAMPLING_RATE * 3 // 2 + 1000 * number] * (0.5 + number / 50)
        soundfile.write(folder / f"{number:02d}.wav", waveform, SAMPLING_RATE)
    (folder / BROKEN).write_bytes(b"RIFF----WAVEnothing")
    return folder


def what_was_heard(record: dict[str, Any]) -> list[Any]:
    """All but the log-probabilities, whose last digits depend on the batch."""
    segments = [(part["start_s"], part["end_s"], part["tokens"]) for part in record["segments"]]
    return [record["source"], record["error"], record["duration_s"], record["text"], segments]


def deadly_load(marker: Path) -> Any:
    """A `load` whose model kills its process at the second batch, once in all."""

    def load_deadly(*arguments: Any) -> tuple[Any, Any]:
        model, processor = load(arguments[0])
        encode = model.get_audio_features
        num_calls = 0

        def die_once(*inputs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 2 and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*inputs)

        model.get_audio_features = die_once
        return model, processor

    return load_deadly


def test_nothing_is_lost_or_doubled(
    address: str, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a real process; then the same command, with a worker that is killed in the middle."""
    out, marker = tmp_path / "out", tmp_path / "killed"
    command = ["transcribe", corpus, "-o", out, "--engine", "ray", "--address", address, "--model", model]
    command += ["--max-new-tokens", 20, "--shard-size", 2]
    process = af3_process(*command)
    deadline = time.monotonic() + 300
    while not list(out.glob("parts/*.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    done = sorted(out.glob("parts/*"))
    assert process.returncode == 130, errors.decode()
    assert b"The same command goes on with the rest." in errors
    assert 0 < len(done) < NUM_FILES / 2
    assert not (out / "transcripts.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in done}

    monkeypatch.setattr(cluster_job, "_load", deadly_load(marker))
    result = af3(*command)
    assert result.exit_code == 1, result.output  # one file is broken
    assert int(marker.read_text()) != os.getpid()
    assert f"{2 * len(done)} already transcribed" in result.stderr
    assert f"{NUM_FILES - 1} transcribed, 1 failed -> {out / 'transcripts.jsonl'}" in result.stderr
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())

    records = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert [Path(record["source"]).name for record in records if record["error"]] == [BROKEN]
    files = [CorpusFile(str(path), str(path)) for path in sorted(corpus.iterdir())]
    options = TranscriptionOptions(max_new_tokens=20)
    expected = map(json.loads, transcribe_files(*load(ModelOptions(str(model), "cpu")), files, options))
    assert [what_was_heard(record) for record in records] == [what_was_heard(record) for record in expected]
    assert len({record["duration_s"] for record in records}) == NUM_FILES  # so that a mix-up shows

    result = af3(*command, "--prompt", "Translate.")
    assert result.exit_code == 1
    assert 'holds the transcripts of another run: other prompt (null, now "Translate.")' in result.stderr


def test_adapters_answer_on_the_workers(address: str, model: Path, corpus: Path, tmp_path: Path) -> None:
    """Each worker loads the adapter; with another one in the same folder the run is another."""
    pytest.importorskip("peft", reason="needs peft")
    adapters = [tmp_path / name for name in ("mine", "other")]
    for seed, folder in enumerate(adapters):
        save_adapter(folder, tiny_reference(), seed, lora_alpha=60)
    paths, out = sorted(corpus.iterdir())[:4], tmp_path / "out"
    command = ["transcribe", *paths, "-o", out, "--engine", "ray", "--address", address, "--model", model]
    command += ["--max-new-tokens", 20, "--shard-size", 1, "--no-vad", "-q"]
    result = af3(*command, "--adapter", adapters[0])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]

    loaded, processor = load(ModelOptions(str(model), "cpu"))
    loaded.load_adapter(adapters[0], "mine")
    files = [CorpusFile(str(path), str(path)) for path in paths]

    def heard(adapter: str | None) -> list[list[Any]]:
        options = TranscriptionOptions(max_new_tokens=20, use_vad=False, adapter=adapter)
        return [
            what_was_heard(json.loads(line)) for line in transcribe_files(loaded, processor, files, options)
        ]

    assert [what_was_heard(record) for record in records] == heard("mine") != heard(None)
    result = af3(*command, "--adapter", adapters[1])
    assert result.exit_code == 1
    assert "holds the transcripts of another run" in result.stderr


def test_an_evaluation_is_that_of_this_process(
    address: str, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it done here, the rest on the cluster, where a worker is killed; and all of it here."""
    pytest.importorskip("whisper_normalizer", reason="needs whisper-normalizer")
    speech = tmp_path / "LibriSpeech/test-clean/1/2"
    speech.mkdir(parents=True)
    for number in range(12):
        shutil.copy(corpus / f"{number:02d}.wav", speech / f"1-2-{number:04d}.wav")
    lines = [f"1-2-{number:04d} PLEASE LEAVE A MESSAGE {number}\n" for number in range(12)]
    (speech / "1-2.trans.txt").write_text("".join(lines))
    command = ["evaluate", "--suite", "librispeech", tmp_path / "LibriSpeech", "--model", model, "--quiet"]
    command += ["--max-new-tokens", 8]
    alone = af3(*command, "-o", tmp_path / "here")
    assert alone.exit_code == 1  # one file is broken
    assert "1 questions could not be asked" in alone.stderr
    whole = (tmp_path / "here/items.jsonl").read_text().splitlines(keepends=True)
    begun = tmp_path / "there"
    begun.mkdir()
    shutil.copy(tmp_path / "here/manifest.json", begun)
    (begun / "items.jsonl").write_text("".join(whole[:4]) + whole[4][:30])

    marker = tmp_path / "killed"
    monkeypatch.setattr(cluster_job, "_load", deadly_load(marker))
    result = af3(
        *command, "-o", begun, "--engine", "ray", "--address", address, "--shard-size", 3, "--batch-size", 1
    )
    assert result.exit_code == 1, result.output
    assert marker.exists(), result.exception
    assert "1 questions could not be asked" in result.stderr
    scores = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "here", begun)]
    for score in scores:
        for part in (score["all"], *score["groups"]["split"].values()):
            assert part.pop("rtfx") > 0
    assert scores[0] == scores[1]
    found = [(begun / "items.jsonl").read_text().splitlines(keepends=True), whole]
    items = [{row["key"]: row for row in map(json.loads, lines)} for lines in found]
    assert len(found[0]) == len(items[0]) == 12
    for rows in items:
        for row in rows.values():
            del row["elapsed_s"]
    assert items[0] == items[1]


def test_cluster_flags_need_the_engine(tmp_path: Path) -> None:
    result = af3("evaluate", tmp_path / "x.jsonl", "-o", tmp_path, "--shard-size", 3)
    assert result.exit_code == 2
    assert "--shard-size: it needs --engine ray" in " ".join(result.stderr.split())


def test_a_model_that_no_worker_can_load(address: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(conversation("07", "hello", 0.5)) + "\n")
    shutil.copy(DATA / "directory_prompt.flac", tmp_path / "07.wav")
    command = ["evaluate", data, "-o", tmp_path / "out", "--model", tmp_path, "--engine", "ray"]
    result = af3(*command, "--address", address)
    assert result.exit_code == 1
    assert "a worker cannot load the model: " in result.stderr
