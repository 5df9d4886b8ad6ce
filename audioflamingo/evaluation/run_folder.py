"""The folder of an evaluation: what was asked of which model, and an item for each answer, written as it comes.

manifest.json   what the answers depend on: versions, model, data, prompts, decoding
items.jsonl     a line for each answer: prompt, answer, what was read out of it, score
summary.json    scores of all items and of groups of them

A run that was stopped, by a signal or a full disk, goes on where it was: a half-written last line is dropped, answers
that failed are asked for again, and no item is there twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from audioflamingo.errors import ArgumentError, OutputError, reason_of
from audioflamingo.evaluation.scoring import ItemResult
from audioflamingo.files import differences, read_json, write_whole

ITEMS_FILE = "items.jsonl"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"


class RunFolder:
    """Opens a folder for a run, a new one or one that was stopped; to be used in a `with` block.

    Args:
        folder: made if it is not there.
        manifest: what the answers depend on; JSON.
        overwrite: throw away what another run left.

    Attributes:
        done: items that are there, by their key.

    Raises:
        ArgumentError: it holds another run, or another process writes to it.
        OutputError: it cannot be written to.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.done: dict[str, ItemResult] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot use the folder {str(folder)!r}: {reason_of(error)}.") from error
        self._lock = _lock(folder)
        try:
            self._begin(json.loads(json.dumps(manifest)), overwrite)
            self._file: TextIO = (folder / ITEMS_FILE).open("a", encoding="utf-8", newline="\n")
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said already
            self._file.close()
        os.close(self._lock)

    def add(self, key: str, item: ItemResult) -> None:
        """Writes an item; it is with the system when this returns.

        Raises:
            OutputError: it cannot be written; what was there before is unharmed.
        """
        try:
            self._file.write(line_of(key, item))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write to {str(self.folder / ITEMS_FILE)!r}: {reason_of(error)}. "
                f"{len(self.done)} answers are kept; the same command goes on with the rest."
            ) from error
        self.done[key] = item

    def _begin(self, manifest: dict[str, Any], overwrite: bool) -> None:
        items, path = self.folder / ITEMS_FILE, self.folder / MANIFEST_FILE
        if overwrite:
            items.unlink(missing_ok=True)
        if items.exists() and items.stat().st_size:
            known = read_json(path) if path.exists() else {}
            if known != manifest:
                raise ArgumentError(
                    f"{str(self.folder)!r} holds another run: {differences(known, manifest)}. Choose another output "
                    "folder, or overwrite it to start again."
                )
            self.done, content = _read_items(items)
            if content != items.read_bytes():
                write_whole(items, content)
            return
        write_whole(path, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, ItemResult]]:
    """The manifest of a run, and its items by their keys.

    Raises:
        ArgumentError: the folder holds no run.
    """
    if not (folder / MANIFEST_FILE).exists() or not (folder / ITEMS_FILE).exists():
        raise ArgumentError(
            f"{str(folder)!r} holds no evaluation: {MANIFEST_FILE} or {ITEMS_FILE} is not there."
        )
    return read_json(folder / MANIFEST_FILE), _read_items(folder / ITEMS_FILE, keeps_failed=True)[0]


def line_of(key: str, item: ItemResult) -> str:
    """An item as a line of JSON."""
    return json.dumps({"key": key, **item.to_dict()}, ensure_ascii=False) + "\n"


def item_of(line: str | bytes) -> tuple[str, ItemResult]:
    """The key and the item of a line."""
    values = json.loads(line)
    key = values.pop("key")
    for name in ("option_logprobs", "audio"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return key, ItemResult(**values)


def _read_items(path: Path, keeps_failed: bool = False) -> tuple[dict[str, ItemResult], bytes]:
    """The items of a file, and the content that it should have: whole lines of answers, each key once."""
    items: dict[str, ItemResult] = {}
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            key, item = item_of(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(
                f"{path} has a line that is no item ({error}): somebody changed it. Restore it, or start again in "
                "another folder."
            ) from error
        if key not in items and (keeps_failed or item.error is None):
            items[key] = item
            kept.append(line)
    return items, b"".join(kept)


def _lock(folder: Path) -> int:
    """Makes sure that this process alone writes to the folder. A process that ends, however, gives it free."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {reason_of(error)}.") from error
    try:
        import fcntl
    except ImportError:  # Windows
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ArgumentError(
            f"another evaluation is writing to {str(folder)!r}: wait for it, or choose another output folder."
        ) from error
    return handle
