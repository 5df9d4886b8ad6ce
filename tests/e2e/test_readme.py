"""The README's programs run as they stand, with the hub id and the file names replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import DATA

README = Path(__file__).parents[2] / "README.md"
REPLACEMENTS = {
    "nvidia/audio-flamingo-3-hf": "nano",
    "speech.flac": str(DATA / "directory_prompt.flac"),
    "animals.ogg": str(DATA / "monkeys.ogg"),
    "max_new_tokens=500": "max_new_tokens=12",
}


def readme_programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_every_program_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    programs = readme_programs()
    assert len(programs) >= 5
    for program in programs:
        for text, replacement in REPLACEMENTS.items():
            program = program.replace(text, replacement)
        exec(compile(program, "README.md", "exec"), names)
    assert len(names["answers"]) == len(names["transcripts"]) == 2
    assert names["loss"].isfinite()
    assert any(p.grad is not None for p in names["model"].parameters())
    assert capsys.readouterr().out.strip()
