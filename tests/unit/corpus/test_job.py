"""A corpus without a cluster: what a worker returns, and what becomes of failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile

from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.corpus import corpus_job as job
from audioflamingo.corpus import ray_data
from audioflamingo.corpus.cluster import ClusterOptions, WorkerPlan
from audioflamingo.corpus.folder import CorpusFolder
from audioflamingo.corpus.ray_data import MAX_ATTEMPTS, AttemptCounter, ShardResult, ShardWorker, run_shards
from audioflamingo.corpus.records import CorpusFile, Shard, cut_shards, transcribe_shard, transcript_record
from audioflamingo.errors import ArgumentError, CheckpointError, ClusterError
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from tests.support.scripted_model import ScriptedModel, framed, tiny_processor

DATA = Path(__file__).parents[2] / "data"
TEXT = "hello world. It is me."
WORK = partial(transcribe_shard, TranscriptionOptions())
FILES = [CorpusFile(f"{number}.wav", f"/{number}.wav") for number in range(6)]


@pytest.fixture
def speech(tmp_path: Path) -> list[CorpusFile]:
    """Two good files, and a broken one between them."""
    for name in ("a.wav", "c.wav"):
        waveform = load_audio(DATA / "directory_prompt.flac")[: 3 * SAMPLING_RATE]
        soundfile.write(tmp_path / name, waveform, SAMPLING_RATE)
    (tmp_path / "b.wav").write_bytes(b"RIFF----WAVEnothing")
    return [CorpusFile(name, str(tmp_path / name)) for name in ("a.wav", "b.wav", "c.wav")]


def make_worker(folder: Path, script: Callable[..., str]) -> tuple[ShardWorker, ScriptedModel]:
    processor = tiny_processor(folder / "processor")
    model = ScriptedModel(processor, script)
    return ShardWorker(lambda: (model, processor), WORK, AttemptCounter().count), model


def test_a_worker_transcribes_files_together(speech: list[CorpusFile], tmp_path: Path) -> None:
    worker, model = make_worker(tmp_path, lambda seconds, attempt: framed(TEXT))
    result = worker(Shard(4, tuple(speech)).to_row())
    assert (result["index"], result["failure"], result["load_error"]) == (4, "", "")
    records = [json.loads(line) for line in result["records"].splitlines()]
    assert [record["source"] for record in records] == ["a.wav", "b.wav", "c.wav"]
    assert [record["text"] for record in records] == [TEXT, "", TEXT]
    assert [record["error"] is None for record in records] == [True, False, True]
    assert "it is not audio" in records[1]["error"]
    assert len(model.calls) == 1  # both files run together


def test_a_failure_is_part_of_the_result(speech: list[CorpusFile], tmp_path: Path) -> None:
    def script(seconds: float, attempt: int) -> str:
        raise KeyError("a bug")

    worker, _ = make_worker(tmp_path, script)
    result = worker(Shard(0, tuple(speech)).to_row())
    assert (result["records"], result["failure"]) == ("", "KeyError: 'a bug'")


def test_a_shard_that_kills_its_workers_is_given_up(speech: list[CorpusFile], tmp_path: Path) -> None:
    worker, model = make_worker(tmp_path, lambda seconds, attempt: framed(TEXT))
    row = Shard(0, tuple(speech)).to_row()
    failures = [worker(row)["failure"] for _ in range(MAX_ATTEMPTS + 1)]
    assert failures[:-1] == [""] * MAX_ATTEMPTS
    assert "its worker died 3 times" in failures[-1]
    assert worker({**row, "index": 1})["failure"] == ""
    assert len(model.calls) == MAX_ATTEMPTS + 1


def test_a_model_that_cannot_be_loaded_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> tuple[Any, Any]:
        raise CheckpointError("there is no folder 'x'.")

    worker = ShardWorker(load, WORK, AttemptCounter().count)
    rows = [worker(shard.to_row()) for shard in cut_shards(FILES, 2)]
    monkeypatch.setattr(ray_data, "_rows", lambda *_: (row for row in rows))
    with pytest.raises(ClusterError, match="cannot load the model: there is no folder 'x'"):
        next(run_shards(cut_shards(FILES, 2), load, WORK, WorkerPlan(1, 1, 0)))


def test_a_shard_that_gets_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = cut_shards(FILES, 2)
    row = {"index": 1, "records": "x\ny\n", "failure": "", "load_error": ""}
    monkeypatch.setattr(ray_data, "_rows", lambda *_: (row for row in [row]))
    results = run_shards(shards, lambda: (None, None), WORK, WorkerPlan(1, 1, 0))
    assert next(results) == ShardResult(shards[1], ("x\n", "y\n"))
    with pytest.raises(ClusterError, match="lost 2 shards"):
        next(results)


def run(folder: CorpusFolder, shards: Sequence[Shard], bad: set[str]) -> tuple[list[list[str]], list[str]]:
    """Runs shards that fail if they hold a bad file; returns what was run, by names, and all records."""
    runs, taken = [], []

    def run_all(parts: Sequence[Shard]) -> Iterator[ShardResult[Shard]]:
        for shard in reversed(parts):
            names = [file.name for file in shard.files]
            runs.append(names)
            if bad & set(names):
                yield ShardResult(shard, (), "boom")
            else:
                yield ShardResult(shard, tuple(transcript_record(name, (), 1.0) for name in names))

    job._run(shards, run_all, folder, taken.extend)
    return runs, taken


def test_only_the_file_at_fault_is_given_up(tmp_path: Path) -> None:
    shards = cut_shards(FILES, 2)
    folder = CorpusFolder(tmp_path, {})
    runs, taken = run(folder, shards, {"0.wav", "1.wav", "3.wav"})
    assert runs == [["4.wav", "5.wav"], ["2.wav", "3.wav"], ["0.wav", "1.wav"]] + [
        [f"{n}.wav"] for n in (1, 0, 3, 2)
    ]
    assert folder.merge(shards) == 3
    records = [json.loads(line) for line in folder.path.read_text().splitlines()]
    assert [record["source"] for record in records] == [file.name for file in FILES]
    assert [record["error"] for record in records] == ["boom", "boom", None, "boom", None, None]
    assert sorted(taken) == sorted(folder.path.read_text().splitlines(keepends=True))


def test_too_many_failures_stop_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "MAX_FAILED_SHARDS", 1)
    shards = cut_shards(FILES, 2)
    folder = CorpusFolder(tmp_path, {})
    with pytest.raises(ClusterError, match="2 shards failed, the last one with: boom"):
        run(folder, shards, {"0.wav", "2.wav"})
    assert [folder.is_done(shard) for shard in shards] == [False, False, True]


@pytest.mark.parametrize(
    ("files", "shard_size", "message"),
    [
        ([], 1, "no files"),
        (FILES, 0, "shard_size must be a whole number of at least 1"),
        ([*FILES, FILES[0]], 1, "share a name"),
    ],
)
def test_what_is_refused_at_once(
    files: list[CorpusFile], shard_size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        job.transcribe_corpus(
            files,
            tmp_path / "out",
            lambda: (None, None),
            model={},
            cluster=ClusterOptions(shard_size=shard_size),
        )
    assert not (tmp_path / "out").exists()
