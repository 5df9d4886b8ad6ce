"""Files on disk: atomic writes, JSON lines, 16 kHz FLAC clips, shards that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SAMPLING_RATE = 16000
INDEX_NAME = "index.jsonl"


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames it into place, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes one JSON object a line, atomically; returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines))
    return len(lines)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_clip(path: Path, waveform: Any) -> float:
    """Writes float samples (N,) at 16 kHz as 16-bit FLAC; returns the duration in seconds."""
    import numpy as np
    import soundfile

    peak = float(np.max(np.abs(waveform))) if len(waveform) else 0.0
    scaled = waveform * (0.99 / peak) if peak > 0.99 else waveform
    soundfile.write(path, scaled, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return len(waveform) / SAMPLING_RATE


def make_shard(folder: Path, fill: Callable[[Path], list[dict[str, Any]]]) -> bool:
    """Fills a shard folder, unless it is complete already.

    Args:
        folder: the shard; it appears under this name only once its files and its index are written.
        fill: writes clips into the folder it is given and returns their index rows; a row's `file` is the
            name of its clip inside the shard.

    Returns:
        True if the shard was made now, False if it existed.
    """
    if (folder / INDEX_NAME).exists():
        return False
    working = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    write_jsonl(working / INDEX_NAME, fill(working))
    os.replace(working, folder)
    return True


def read_shards(root: Path, data_dir: Path) -> Iterator[dict[str, Any]]:
    """Yields the index rows of every complete shard below `root`, with `path` relative to the data folder."""
    for index in sorted(root.rglob(INDEX_NAME)):
        if any(part.startswith(".") for part in index.relative_to(root).parts):
            continue
        for row in read_jsonl(index):
            yield {**row, "path": (index.parent / row["file"]).relative_to(data_dir).as_posix()}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
