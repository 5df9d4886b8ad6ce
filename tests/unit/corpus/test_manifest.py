"""Lists of files as an input of `af3 transcribe`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audioflamingo.cli.inputs import find_inputs
from audioflamingo.errors import ArgumentError
from tests.support.cli_runs import af3


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_paths_are_relative_to_the_list(tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "lists" / "all.jsonl",
        {"path": "a.wav", "text": "ignored"},
        {"audio_filepath": "/data/b.flac", "duration": 1.5},
        "\n",
        {"path": "https://example.org/c.mp3"},
        {"path": "./a.wav"},
    )
    found = find_inputs([str(manifest), "/data/b.flac"])
    assert [item.name for item in found] == [
        str(tmp_path / "lists" / "a.wav"),
        "/data/b.flac",
        "https://example.org/c.mp3",
    ]
    assert [str(item.output_stem) for item in found] == ["a", "b", "c"]


@pytest.mark.parametrize("line", ["a.wav", '"a.wav"', "{}", '{"path": 3}', '{"path": ""}', '{"path": "a'])
def test_a_line_that_names_no_file(line: str, tmp_path: Path) -> None:
    manifest = write(tmp_path / "x.jsonl", {"path": "a.wav"}, line)
    with pytest.raises(ArgumentError, match=r"line 2 of .*x.jsonl' must be a JSON object with the path"):
        find_inputs([str(manifest)])


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    result = af3("transcribe", tmp_path / "x.jsonl")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot read the list of files")
