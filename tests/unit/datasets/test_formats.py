"""Data sets in the forms and files that people have: NeMo, CSV, ms-swift, Hugging Face, WebDataset, and stretches."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioflamingo.audio.loading import load_audio
from audioflamingo.audio.stored import StoredAudio
from audioflamingo.datasets.conversations import Skipped, count_reasons, read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ArgumentError, AudioError, DataError
from tests.support.tiny_training import conversation, write_clip, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("formats")
    for number, seconds in enumerate((1.0, 0.5, 0.7)):
        write_clip(base / f"{'abc'[number]}.wav", seconds, number)
    return base


def read(path: Path | str, on_bad_row: str = "error", **options: Any):
    return read_dataset(DatasetConfig(str(path), **options), on_bad_row)


def question(row) -> str:
    return "".join(p["text"] for p in row.messages[0]["content"] if p["type"] == "text")


def answer(row) -> str:
    return row.messages[-1]["content"][0]["text"]


# Stretches


def test_a_stretch_is_exactly_those_samples(folder: Path) -> None:
    whole = load_audio(folder / "a.wav")
    path = str(folder / "a.wav")
    assert np.array_equal(load_audio(StoredAudio(path, 0.25, 0.5)), whole[4000:12000])
    assert np.array_equal(load_audio(StoredAudio(path, 0.25)), whole[4000:])
    assert np.array_equal(
        load_audio(StoredAudio(path, 0.95, 0.1)), whole[15200:]
    )  # stated lengths are rounded
    with pytest.raises(AudioError, match=r"a\.wav from 0\.5 s for 0\.7 s: the recording lasts 1\.00 s only"):
        load_audio(StoredAudio(path, 0.5, 0.7))
    with pytest.raises(AudioError, match=r"lasts 1\.00 s only"):
        load_audio(StoredAudio(path, 3.0))
    for start, length in ((-1.0, None), (0.0, 0.0), (float("nan"), None)):
        with pytest.raises(ArgumentError, match="a stretch of audio"):
            StoredAudio(path, start, length)


def test_rows_of_a_nemo_manifest_are_stretches_of_one_file(folder: Path) -> None:
    rows = [
        {"audio_filepath": "a.wav", "offset": 0.0, "duration": 0.25, "text": "one"},
        {"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5, "text": "two"},
        {"audio_filepath": "b.wav", "duration": 0.5, "text": "three"},
    ]
    path = write_rows(folder / "nemo.json", rows)
    found = read(path).rows
    assert [row.duration_s for row in found] == [0.25, 0.5, 0.5]
    assert [row.transcript for row in found] == ["one", "two", "three"]
    assert question(found[0]) == "Transcribe the input speech."
    assert len(load_audio(found[1].audio[0])) == 8000
    assert found[1].messages[0]["content"][1]["path"] == found[1].audio[0]
    assert len({row.id for row in found}) == 3


def test_stretches_in_messages_and_in_nvidias_rows(folder: Path) -> None:
    ours = conversation("a", "hello", 0.5)
    ours["messages"][0]["content"][1] |= {"offset": 0.5, "duration": 0.25}
    del ours["duration_s"]
    theirs = {
        "id": "n", "sound": "a.wav", "offset": 0.1, "duration": 0.2,
        "conversations": [{"from": "human", "value": "<sound>\nWhat?"}, {"from": "gpt", "value": "noise"}],
    }  # fmt: skip
    first, second = read(write_rows(folder / "mixed.jsonl", [ours, theirs])).rows
    assert first.audio == (StoredAudio(str(folder / "a.wav"), 0.5, 0.25),)
    assert first.duration_s == 0.25
    assert second.audio == (StoredAudio(str(folder / "a.wav"), 0.1, 0.2),)


def test_a_stretch_has_features_of_its_own_in_the_cache(folder: Path) -> None:
    from audioflamingo.training.feature_cache import _FileTable

    table = _FileTable(folder / "cache")
    path = str(folder / "a.wav")
    digests = [table.digest(audio) for audio in (path, StoredAudio(path, 0.1), StoredAudio(path, 0.2))]
    assert len(set(digests)) == 3


# Forms of rows


def test_csv_with_questions_options_and_a_prompt(folder: Path) -> None:
    path = folder / "set.csv"
    path.write_text('file_name,transcription\na.wav,"hello, world"\nb.wav,why\n', encoding="utf-8-sig")
    assert [row.transcript for row in read(path).rows] == ["hello, world", "why"]
    (first, _) = read(path, prompt="What is this?").rows
    assert (question(first), answer(first)) == ("What is this?", "hello, world")
    path.write_text("path\tquestion\tanswer\na.wav\tWho?\tme\n", encoding="utf-8")
    path.rename(path.with_suffix(".tsv"))
    (row,) = read(path.with_suffix(".tsv")).rows
    assert (question(row), answer(row)) == ("Who?", "me")


def test_options_and_answers_by_text_or_letter(folder: Path) -> None:
    rows = [
        {"audio": "a.wav", "question": "Which?", "choices": ["dog", "cat"], "answer": given}
        for given in ("cat", "A")
    ]
    first, second = read(write_rows(folder / "choice.jsonl", rows)).rows
    assert question(first) == "Which?\n(A) dog\n(B) cat"
    assert (answer(first), answer(second)) == ("(B) cat", "(A) dog")
    bad = write_rows(folder / "key.jsonl", [{**rows[0], "answer": "cow"}])
    with pytest.raises(DataError, match=r"key\.jsonl:1: the answer 'cow' is none of the options"):
        read(bad)


def test_ms_swift_messages_and_queries(folder: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<audio>Then <audio>which is louder?"},
                {"role": "assistant", "content": "the second"},
            ],
            "audios": ["a.wav", "b.wav"],
        },
        {"query": "What is it?", "response": "noise", "audios": ["c.wav"]},
        {
            "messages": [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "x"}],
            "audios": [],
        },
    ]
    path = write_rows(folder / "swift.jsonl", rows)
    dataset = read(path, "skip")
    first, second = dataset.rows
    kinds = [part.get("text") or Path(part["path"]).name for part in first.messages[1]["content"]]
    assert kinds == ["a.wav", "Then ", "b.wav", "which is louder?"]
    assert [Path(part["path"]).name for part in second.messages[0]["content"] if "path" in part] == ["c.wav"]
    assert dataset.skipped[0].reason == "<audio> is number 1, but the row has 0 clip(s)"


# Files


def write_table(path: Path, folder: Path, with_bytes: bool = True) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    audio = [
        {"bytes": (folder / f"{name}.wav").read_bytes() if with_bytes else None, "path": f"{name}.wav"}
        for name in "abc"
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"audio": pyarrow.array(audio, kind), "text": ["one", "two", "three"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        with path.open("wb") as file, ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "train/data-00000-of-00001.arrow"])
def test_folders_of_hugging_face(folder: Path, tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name, folder)
    rows = read(tmp_path).rows
    assert [row.transcript for row in rows] == ["one", "two", "three"]
    assert rows[2].duration_s == pytest.approx(0.7, abs=0.01)
    assert np.array_equal(load_audio(rows[2].audio[0]), load_audio(folder / "c.wav"))
    assert rows[2].audio[0] == pickle.loads(pickle.dumps(rows[2].audio[0]))
    write_table(tmp_path / name.replace("train", "test"), folder)
    with pytest.raises(DataError, match="several splits: test, train; choose one with split"):
        read(tmp_path)
    assert len(read(tmp_path, split="test").rows) == 3
    with pytest.raises(DataError, match="no split 'dev', only test, train"):
        read(tmp_path, split="dev")


def test_a_table_that_names_files(folder: Path) -> None:
    write_table(folder / "named.parquet", folder, with_bytes=False)
    assert [Path(row.audio[0]).name for row in read(folder / "named.parquet").rows] == [
        "a.wav",
        "b.wav",
        "c.wav",
    ]


def write_shard(path: Path, samples: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_webdataset(folder: Path, tmp_path: Path) -> None:
    a, b, c = ((folder / f"{name}.wav").read_bytes() for name in "abc")
    nvidia = {
        "id": "n",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "noise"}],
    }
    write_shard(
        tmp_path / "shard-000.tar",
        {"x/1.wav": a, "x/1.txt": b"one\n", "x/2.json": b'{"text": "two", "duration": 0.5}', "x/2.wav": b},
    )
    write_shard(
        tmp_path / "shard-001.tar", {"3.wav": c, "3.json": json.dumps(nvidia).encode(), "4.txt": b"lost"}
    )
    dataset = read(tmp_path / "shard-{000..001}.tar", "skip")
    assert [answer(row) for row in dataset.rows[2:]] == ["noise"]
    assert [row.transcript for row in dataset.rows[:2]] == ["one", "two"]
    assert np.array_equal(load_audio(dataset.rows[0].audio[0]), load_audio(folder / "a.wav"))
    assert np.array_equal(load_audio(dataset.rows[2].audio[0]), load_audio(folder / "c.wav"))
    assert [item.place for item in dataset.skipped] == [f"{tmp_path}/shard-001.tar:4"]
    assert len(read(tmp_path / "shard-*.tar", "skip").rows) == 3
    with pytest.raises(DataError, match=r"1 file\(s\) are missing, such as .*shard-002"):
        read(tmp_path / "shard-{000..002}.tar")


def test_folders_and_files_that_are_no_data_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mmau-test.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"no data set that is known.*It has mmau-test\.txt"):
        read(tmp_path)
    (tmp_path / "set.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it"):
        read(tmp_path / "set.tar.gz")
    for name in ("broken.parquet", "broken.arrow", "broken.tar"):
        (tmp_path / name).write_bytes(b"no such thing" * 50)
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            read(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,x\n", encoding="utf-8")
    write_clip(tmp_path / "a.wav", 0.3, 0)
    for broken in tmp_path.glob("broken*"):
        broken.unlink()
    assert len(read(tmp_path).rows) == 1


def test_what_was_skipped_is_counted_by_reason(folder: Path) -> None:
    rows = [
        {"audio_filepath": "a.wav", "text": "one"},
        {"audio_filepath": "gone-1.wav", "text": "two"},
        {"audio_filepath": "gone-2.wav", "text": "three"},
        {"audio_filepath": "a.wav", "text": ""},
        {"audio_filepath": "https://host/a.wav", "text": "four"},
    ]
    dataset = read(write_rows(folder / "skipped.jsonl", rows), "skip")
    assert dataset.num_bad == 4
    kinds = count_reasons(dataset.skipped)
    assert kinds[0] == ("there is no audio file", 2)
    assert ("the answer is empty", 1) in kinds
    assert any("is an address" in kind for kind, _ in kinds)


def test_a_kind_of_reason_reads_without_its_names_and_numbers() -> None:
    reasons = (
        "40052 tokens, more than the 16384 of the model's context",
        "the id 'one \"two\" 3' occurs twice",
        "0.5 s of audio, not 1 to 600 s",
        "there is no audio file '/of mine/a b.wav'",
    )
    kinds = [kind for kind, _ in count_reasons([Skipped("x:1", reason, True) for reason in reasons])]
    assert kinds == [
        "… tokens, more than the … of the model's context",
        "the id … occurs twice",
        "… s of audio, not … to … s",
        "there is no audio file",
    ]
