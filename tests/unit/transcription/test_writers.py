"""Transcripts as files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from audioflamingo.errors import OutputError
from audioflamingo.transcription import FORMATS, Segment, format_transcript, write_transcript
from audioflamingo.transcription.writers import Formatter, time_stamp

SEGMENTS = [
    Segment(0.0, 2.5, "hello, world", (1, 2), -0.25),
    Segment(2.5, 4.0, "", (), None, "stop", ("no_words",)),
    Segment(3599.9996, 363600.0, "a <b> & c --> d\n\n\tnext \x85line", (), None, "loop"),
]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "00:00:00.000"),
        (59.9996, "00:01:00.000"),
        (3599.9995, "01:00:00.000"),
        (1.0005, "00:00:01.000"),
        (360000.123, "100:00:00.123"),
    ],
)
def test_time_stamps_carry_over(seconds: float, expected: str) -> None:
    assert time_stamp(seconds) == expected


def test_txt() -> None:
    assert format_transcript(SEGMENTS, "txt") == "hello, world\na <b> & c --> d next line\n"


def test_srt_numbers_what_it_shows_and_has_no_empty_line_in_a_cue() -> None:
    assert format_transcript(SEGMENTS, "srt") == (
        "1\n00:00:00,000 --> 00:00:02,500\nhello, world\n\n"
        "2\n01:00:00,000 --> 101:00:00,000\na <b> & c -> d next line\n\n"
    )


def test_vtt_has_its_head_and_escapes() -> None:
    assert format_transcript(SEGMENTS, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nhello, world\n\n"
        "01:00:00.000 --> 101:00:00.000\na &lt;b&gt; &amp; c -&gt; d next line\n\n"
    )
    assert format_transcript([], "vtt") == "WEBVTT\n\n"


def test_tsv_has_whole_milliseconds_and_one_line_a_segment() -> None:
    lines = format_transcript(SEGMENTS, "tsv").splitlines()
    assert lines == [
        "start_ms\tend_ms\ttext",
        "0\t2500\thello, world",
        "3600000\t363600000\ta <b> & c --> d next line",
    ]


def test_json_and_jsonl_hold_everything() -> None:
    content = json.loads(format_transcript(SEGMENTS, "json", "a.wav", 12.3456))
    assert (content["source"], content["duration_s"]) == ("a.wav", 12.346)
    assert content["text"] == "hello, world a <b> & c --> d next line"
    lines = [json.loads(line) for line in format_transcript(SEGMENTS, "jsonl", "a.wav").splitlines()]
    assert [{"source": "a.wav", **segment} for segment in content["segments"]] == lines
    assert lines[0]["tokens"] == [1, 2]
    assert lines[1]["flags"] == ["no_words"]
    assert lines[2]["finish_reason"] == "loop"
    assert lines[2]["text"] == SEGMENTS[2].text


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.is_whole])
def test_pieces_make_the_whole(name: str) -> None:
    formatter = Formatter(name, "a.wav")
    assert formatter.head + "".join(map(formatter.piece, SEGMENTS)) == format_transcript(
        SEGMENTS, name, "a.wav"
    )


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "ünï 日本.txt"
    write_transcript(path, SEGMENTS[:1], "txt")
    write_transcript(path, [Segment(0, 1, "größer")], "txt")
    assert path.read_bytes() == "größer\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, no_space)
    with pytest.raises(
        OutputError, match=r"No space left on device.*Nothing that was there before has changed"
    ):
        write_transcript(path, SEGMENTS, "txt")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_transcript(path, SEGMENTS, "txt")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        write_transcript(tmp_path / "nowhere" / "a.txt", SEGMENTS, "txt")
