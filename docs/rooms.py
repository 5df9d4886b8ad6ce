"""Prints the list of rooms in docs/architecture.md: `python -m docs.rooms`. A test compares it with the page."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.unit.test_architecture import PACKAGE, ROWS


def rooms() -> str:
    """A row of a table for each part of the package, its name, what it says of itself, its modules."""
    lines = ["| room | what it is | modules |", "|---|---|---|"]
    for name in ROWS:
        path = PACKAGE / name
        is_folder = path.is_dir()
        source = path / "__init__.py" if is_folder else path.with_suffix(".py")
        modules = (
            sorted(p.stem for p in path.glob("*.py") if not p.stem.startswith("__")) if is_folder else []
        )
        lines.append(f"| `{name}` | {summary(source)} | {', '.join(modules)} |")
    return "\n".join(lines)


def summary(source: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.replace("|", "\\|")


if __name__ == "__main__":
    print(rooms())
