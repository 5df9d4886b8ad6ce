"""The page of measurements: what the benchmarks' README says, and every figure of the results files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def performance_page(benchmarks: Path) -> str:
    """The page.

    Args:
        benchmarks: the folder with the scripts, their README and `results/`.
    """
    text = (benchmarks / "README.md").read_text(encoding="utf-8")
    text = re.sub(
        r"^# .*\n", "# Performance\n\n![Time as a share of the peer's](../inference.png)\n", text, count=1
    )
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"`\1`", text)
    lines = [
        text,
        "",
        "## All figures",
        "",
        "Of the files in `benchmarks/results/`, as their scripts wrote them.",
        "",
    ]
    for path in sorted((benchmarks / "results").glob("*.json")):
        lines += [f"### {path.name}", "", "| | |", "|---|---|"]
        lines += [
            f"| {name} | {value} |" for name, value in _rows(json.loads(path.read_text(encoding="utf-8")))
        ]
        lines.append("")
    return "\n".join(lines)


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every figure and where it stands; a list of plain values is one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _rows(inner, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value, 1):
            yield from _rows(item, f"{name} {number}".strip())
    else:
        yield _cell(name), _cell(_figure(value))


def _figure(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
