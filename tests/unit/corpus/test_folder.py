"""The output folder of a corpus: parts, going on, refusals, the whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from audioflamingo.corpus import folder as folder_module
from audioflamingo.corpus.folder import CorpusFolder, describe_files, fingerprint_checkpoint
from audioflamingo.corpus.records import CorpusFile, Shard, cut_shards, error_record, transcript_record
from audioflamingo.errors import ArgumentError, OutputError
from audioflamingo.transcription.segments import Segment

FILES = [CorpusFile(f"in/{number}.wav", f"/data/in/{number}.wav") for number in range(7)]
RUN = {"max_new_tokens": 500, **describe_files(FILES)}


def records_of(shard: Shard) -> list[str]:
    return [transcript_record(file.name, [Segment(0, 1, "line\u2028end")], 1.0) for file in shard.files]


def open_and_write(path: Path, shards: Sequence[Shard]) -> CorpusFolder:
    folder = CorpusFolder(path, RUN)
    for shard in shards:
        folder.write_part(shard, records_of(shard))
    return folder


def test_shards_hold_every_file_once_in_order() -> None:
    shards = cut_shards(FILES, 3)
    assert [len(shard.files) for shard in shards] == [3, 3, 1]
    assert [file for shard in shards for file in shard.files] == FILES
    assert [Shard.from_row(shard.to_row()) for shard in shards] == shards


def test_a_run_goes_on_and_ends_in_one_file(tmp_path: Path) -> None:
    shards = cut_shards(FILES, 3)
    open_and_write(tmp_path, shards[1:])
    folder = CorpusFolder(tmp_path, RUN)
    assert [folder.is_done(shard) for shard in shards] == [False, True, True]
    folder.write_part(shards[0], [*records_of(shards[0])[:2], error_record("in/2.wav", "two\nlines")])
    assert folder.merge(shards) == 1
    records = [json.loads(line) for line in folder.path.read_text().splitlines()]
    assert [record["source"] for record in records] == [file.name for file in FILES]
    assert [record["error"] for record in records] == [None, None, "two lines", *[None] * 4]
    assert {tuple(record) for record in records} == {
        ("source", "error", "duration_s", "text", "no_speech", "segments")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "run.json", "transcripts.jsonl"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_new_tokens": 60}, "max_new_tokens (500, now 60)"),
        (describe_files(FILES[:-1]), "files_sha256, num_files (7, now 6)"),
        (describe_files(FILES[::-1]), "files_sha256"),
        ({"prompt": "Translate."}, 'prompt (null, now "Translate.")'),
    ],
)
def test_another_run_is_refused(changes: dict[str, object], named: str, tmp_path: Path) -> None:
    shards = cut_shards(FILES, 3)
    open_and_write(tmp_path, shards)
    with pytest.raises(ArgumentError) as refusal:
        CorpusFolder(tmp_path, {**RUN, **changes})
    assert f"other {named}." in str(refusal.value)
    assert "--overwrite" in str(refusal.value)
    assert not CorpusFolder(tmp_path, {**RUN, **changes}, overwrite=True).is_done(shards[0])


def test_parts_that_somebody_changed_are_not_merged(tmp_path: Path) -> None:
    shards = cut_shards(FILES, 3)
    folder = open_and_write(tmp_path, shards)
    part = tmp_path / "parts" / "00000001.jsonl"
    for content in (part.read_text() * 2, "", "{}\n", "no JSON\n"):
        part.write_text(content)
        with pytest.raises(
            OutputError, match=r"00000001.jsonl' does not hold one record for each of its files"
        ):
            folder.merge(shards)
    assert not folder.path.exists()


def test_a_part_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    shard = cut_shards(FILES, 3)[0]
    folder = CorpusFolder(tmp_path, RUN)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        folder.write_part(shard, records_of(shard))
    assert list((tmp_path / "parts").iterdir()) == []
    assert not folder.is_done(shard)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot use the folder"):
        CorpusFolder(tmp_path / "file", RUN)
    (tmp_path / folder_module.RUN_FILE).write_text("[]")
    with pytest.raises(ArgumentError, match=r"run.json' is not of this program"):
        CorpusFolder(tmp_path, RUN)


def test_checkpoints_are_told_apart_by_content(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    content = bytearray(4_000_000)
    weights.write_bytes(content)
    before = fingerprint_checkpoint(tmp_path)
    os.utime(weights, (0, 0))
    assert fingerprint_checkpoint(tmp_path) == before
    content[-1] = 1
    weights.write_bytes(content)
    after = fingerprint_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert len({before, after, fingerprint_checkpoint(tmp_path)}) == 3
