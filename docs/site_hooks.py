"""Pages of the documentation that are made from the code and from files outside of docs/, for MkDocs.

MkDocs calls `on_files` (its hooks, https://www.mkdocs.org/user-guide/configuration/#hooks); nothing is written here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from audioflamingo.server.openapi import openapi  # noqa: E402
from docs.command_page import command_page  # noqa: E402
from docs.http_page import http_page  # noqa: E402
from docs.performance_page import performance_page  # noqa: E402
from docs.python_pages import errors_page, options_page, python_page  # noqa: E402

# Files of the repository that are pages too.
COPIES = {
    "CHANGELOG.md": "about/changes.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "audioflamingo/nano/README.md": "about/nano.md",
    "tests/README.md": "tests.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the made pages."""
    pages = {
        "reference/commands.md": command_page(),
        "reference/http.md": http_page(openapi()),
        "reference/python.md": python_page(),
        "reference/options.md": options_page(),
        "reference/errors.md": errors_page(),
        "about/performance.md": performance_page(ROOT / "benchmarks"),
        "openapi.json": json.dumps(openapi(), indent=1),
        **{page: copy(ROOT / source, page) for source, page in COPIES.items()},
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def copy(source: Path, page: str) -> str:
    """A file as a page: links between pages stay links, those to other files of the repository become their names."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if re.match(r"https?:|mailto:|#", target):
            return match.group()
        path, _, anchor = target.partition("#")
        inside = (source.parent / path).resolve().relative_to(ROOT).as_posix()
        found = COPIES.get(inside) or (inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if found is None or found.endswith((".py", "/")):
            return f"{words} (`{inside}`)" if inside not in words else str(words)
        return f"[{words}]({'../' * page.count('/')}{found}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, source.read_text(encoding="utf-8"))
