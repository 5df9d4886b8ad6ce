"""Files that are written whole or not at all, and the small text files of a checkpoint folder."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audioflamingo.errors import CheckpointError


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        CheckpointError: the file cannot be opened or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): is the download complete?") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content


def to_json(content: dict[str, Any]) -> str:
    """The text that checkpoint folders hold for `content`: indented, sorted, one line feed at the end."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, if they are not there.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot save to {folder}: {error}.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`; the file that the block writes there takes its place at the end, or is removed.

    It is flushed to the disk before it is renamed, so that `path` holds the old or the new content, never half of it.
    """
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written; what was there before is unchanged.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}.") from error


def sync_folder(folder: Path) -> None:
    """Makes the renames reach the disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
