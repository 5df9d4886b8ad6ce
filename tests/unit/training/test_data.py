"""Reading data sets: the message format, NVIDIA's JSON, bad rows; and the order of batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ConfigError, DataError
from audioflamingo.training.batch_sampler import plan_epoch
from audioflamingo.training.training_config import BatchConfig
from tests.support.tiny_training import conversation, write_clip, write_dataset, write_rows


def read(path: Path, *args, **options):
    return read_dataset(DatasetConfig(str(path), **options), *args)


def test_conversations_with_absolute_paths_and_transcripts(tmp_path: Path) -> None:
    rows = read(write_dataset(tmp_path, 4)).rows
    assert [row.id for row in rows] == ["train-0", "train-1", "train-2", "train-3"]
    assert rows[0].audio == (str(tmp_path / "train-0.wav"),)
    assert rows[0].place == f"{tmp_path / 'train.jsonl'}:1"
    assert len(rows[0].transcript.split()) == 3
    assert rows[3].audio == ()
    assert rows[3].transcript is None


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, 4)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert [row.id for row in read(path).rows] == ["train-0", "train-1", "train-2", "train-3"]


def nvidia(value: str, sound=("a.wav",), **changes):
    return {
        "id": "n",
        "sound": list(sound) if len(sound) > 1 else sound[0],
        "duration": 0.3,
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "answer"}],
        **changes,
    }


@pytest.mark.parametrize(
    ("value", "sound", "expected"),
    [
        ("<sound>\nWhat?", ["a.wav"], ["a.wav", "What?"]),
        ("What?\n<sound>", ["a.wav"], ["What?\n", "a.wav"]),
        ("What?", ["a.wav"], ["a.wav", "What?"]),
        ("<sound-2>\nvs <sound-1>", ["a.wav", "b.wav"], ["b.wav", "vs ", "a.wav"]),
        ("<sound><sound>\nWhich?", ["a.wav", "b.wav"], ["a.wav", "b.wav", "Which?"]),
    ],
)
def test_nvidia_markers(tmp_path: Path, value, sound, expected) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.wav", 0.3, 0)
    path = tmp_path / "set.json"
    path.write_text(json.dumps([nvidia(value, sound)]), encoding="utf-8")
    (row,) = read(path).rows
    parts = [part.get("text") or Path(part["path"]).name for part in row.messages[0]["content"]]
    assert parts == expected
    assert row.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}
    assert row.duration_s == 0.3


def test_a_second_turn_may_name_another_clip(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.wav", 0.3, 0)
    turns = [
        {"from": "human", "value": "<sound-1>\nThis?"},
        {"from": "gpt", "value": "x"},
        {"from": "human", "value": "<sound-2>\nAnd this?"},
        {"from": "gpt", "value": "y"},
    ]
    path = write_rows(
        tmp_path / "set.jsonl", [nvidia("", ["a.wav", "b.wav"], conversations=turns, duration=None)]
    )
    (row,) = read(path).rows
    assert [Path(path).name for path in row.audio] == ["a.wav", "b.wav"]
    assert row.duration_s == pytest.approx(0.6, abs=0.01)  # probed


BAD_ROWS = [
    ("{", "not valid JSON"),
    ([], "a row is a JSON object"),
    (conversation("lost", "hello", 0.3), "there is no audio file .*lost.wav"),
    ({"id": "x", "messages": [{"role": "user", "content": "hi"}]}, "no answer"),
    ({"id": "x", "messages": [{"role": "robot", "content": "hi"}]}, "robot"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "the key 'id' is missing"),
    ({"id": "good"}, "'messages' is missing"),
    ({"id": "x", "audio_filepath": "good.wav"}, "there is no answer: none of the columns answer, text,"),
    ({"id": "x", "text": "hello"}, "there is no recording: none of the columns audio_filepath,"),
    (nvidia("<sound-2>", ["good.wav"]), "number 2, but the row has 1"),
    (nvidia("<sound-1>", ["good.wav", "good.wav"]), "only 1 are named"),
    (nvidia("", ["good.wav"], conversations=[{"from": "cat", "value": "miau"}]), "cat"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_bad_rows_are_named_and_skipped_or_fatal(tmp_path: Path, bad, reason, caplog) -> None:
    write_clip(tmp_path / "good.wav", 0.3, 0)
    path = write_rows(
        tmp_path / "set.jsonl", [conversation("good", "hello", 0.3), bad if bad == "{" else json.dumps(bad)]
    )
    with pytest.raises(DataError, match=rf"set\.jsonl:2: .*{reason}.*\. Repair the row, or leave it out\."):
        read(path)
    with pytest.raises(DataError, match=r"Repair the row, or set on_bad_row: skip\."):
        read(path, "error")
    dataset = read(path, "skip")
    assert [row.id for row in dataset.rows] == ["good"]
    assert dataset.num_bad == 1
    assert "set.jsonl:2" in caplog.text


def test_limits_samples_and_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, 12)
    assert len(read(path, "error", 0.0, 0.5).rows) < 12
    assert len(read(path, max_rows=5).rows) == 5
    assert read(path, max_rows=5).rows == read(path, max_rows=5).rows
    with pytest.raises(DataError, match="no usable row"):
        read(path, "error", 100.0)
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "nowhere.jsonl")
    twice = write_rows(tmp_path / "twice.jsonl", [conversation("train-0", "hello", 0.3)] * 2)
    with pytest.raises(DataError, match=r"twice\.jsonl:2: the id 'train-0' occurs twice"):
        read(twice)


# Order of batches

TOKENS = np.random.default_rng(0).integers(20, 400, 200).tolist()
AUDIO_S = [tokens / 25 for tokens in TOKENS]


def plan(epoch: int = 0, sets=((200, 1.0),), seed: int = 0, **limits):
    return plan_epoch(
        TOKENS, AUDIO_S, sets, BatchConfig(**{"max_tokens": 1000, "max_rows": 8, **limits}), seed, epoch
    )


def test_batches_hold_their_limits_and_every_row_once() -> None:
    batches = plan()
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) <= 8 and sum(TOKENS[row] for row in batch) <= 1000 for batch in batches)
    assert all(sum(AUDIO_S[row] for row in batch) <= 20 for batch in plan(max_audio_s=20.0))
    assert plan_epoch([5000], [200.0], [(1, 1.0)], BatchConfig(max_tokens=1000), 0, 0) == [[0]]


def test_the_order_follows_seed_and_epoch_alone() -> None:
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)
    assert plan(1, seed=1) != plan(1)


def test_rows_of_a_batch_are_of_similar_length() -> None:
    spans = [max(TOKENS[r] for r in batch) - min(TOKENS[r] for r in batch) for batch in plan()]
    assert np.median(spans) < 60  # at random it is about 300


def test_weights_repeat_and_thin_out() -> None:
    rows = [row for batch in plan(sets=((100, 2.0), (100, 0.25))) for row in batch]
    assert all(rows.count(row) == 2 for row in range(100))
    assert sum(row >= 100 for row in rows) == 25
    other = {row for batch in plan(1, sets=((100, 2.0), (100, 0.25))) for row in batch if row >= 100}
    assert other != {row for row in rows if row >= 100}


def test_epochs_hold_whole_steps() -> None:
    assert len(plan(batches_per_step=4)) % 4 == 0
    with pytest.raises(ConfigError, match="fewer than batches_per_step"):
        plan(batches_per_step=1000)
