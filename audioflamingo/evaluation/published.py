"""Data sets of benchmarks as they are published: JSON, JSONL, CSV, parquet, folders of transcripts; on disk or the hub.

Only files are known here; what their columns mean is `columns`'.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.datasets.row_files import AUDIO_SUFFIXES, Entry, read_entries
from audioflamingo.errors import DataError, reason_of
from audioflamingo.hub import resolve_dataset

TABLES = (".json", ".jsonl", ".csv", ".parquet")
TRANSCRIPTS = "*.trans.txt"


@dataclass(frozen=True)
class Record:
    """One row as it is published.

    Attributes:
        place: file and row, for messages.
        folder: what its audio paths are relative to.
        values: column to value.
    """

    place: str
    folder: Path
    values: dict[str, Any]


def read_records(data: str | Path, prefers: tuple[str, ...] = ()) -> Iterator[Record]:
    """Reads all rows of a data set.

    Args:
        data: a table (`.json`, `.jsonl`, `.csv`, `.parquet`), a folder with one, with parquet shards, or with
            LibriSpeech's transcripts, or the id of a data set on the hub.
        prefers: patterns of the names of the tables that count where a folder holds several.

    Raises:
        DataError: nothing there can be read.
    """
    path = Path(data).expanduser()
    if not path.exists():
        path = resolve_dataset(str(data))
    if path.is_file():
        yield from _read_table(path)
        return
    transcripts = sorted(path.rglob(TRANSCRIPTS))
    if transcripts:
        for file in transcripts:
            yield from _read_transcripts(file)
        return
    for file in _tables_of(path, prefers):
        yield from _read_table(file)


def _tables_of(folder: Path, prefers: tuple[str, ...]) -> list[Path]:
    """The tables of a folder: those with a preferred name, else all parquet shards, else the only one there is."""
    tables = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TABLES)
    tables = [path for path in tables if not path.name.startswith(".")]
    for pattern in prefers:
        if found := [path for path in tables if path.match(pattern)]:
            return found[:1] if found[0].suffix != ".parquet" else found
    shards = [path for path in tables if path.suffix.lower() == ".parquet"]
    found = shards or tables
    if not found:
        raise DataError(
            f"{str(folder)!r} holds no table ({', '.join(TABLES)}) and no transcripts ({TRANSCRIPTS}): name the data "
            "set's folder or file."
        )
    if not shards and len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise DataError(f"{str(folder)!r} holds {len(found)} tables ({names}): name one of them.")
    return found


def _read_table(path: Path) -> Iterator[Record]:
    if path.suffix.lower() not in TABLES:
        raise DataError(f"{path} is none of {', '.join(TABLES)}.")
    if path.suffix.lower() == ".csv":
        entries: Iterable[Entry] = _csv_entries(path)
    else:
        entries = read_entries(DatasetConfig(str(path)))
    for entry in entries:
        place = f"{path}:{entry.place}"
        if not isinstance(entry.value, dict):
            raise DataError(f"{place}: a row must be an object, this is {entry.value!r}.")
        yield Record(place, path.parent, entry.value)


def _csv_entries(path: Path) -> Iterator[Entry]:
    """Rows of a table that may be in Latin-1, as Clotho-AQA's are."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason_of(error)}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    for number, values in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=1):
        yield Entry(path, str(number), values)


def _read_transcripts(path: Path) -> Iterator[Record]:
    """LibriSpeech's `84-121123.trans.txt`: an id and a transcript a line, the audio beside it under the id."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        id, _, text = line.partition(" ")
        if not id:
            continue
        file = next(
            (f"{id}{s}" for s in AUDIO_SUFFIXES if (path.parent / f"{id}{s}").is_file()), f"{id}.flac"
        )
        split = next(
            (part for part in reversed(path.parts) if part.startswith(("test-", "dev-", "train-"))), ""
        )
        yield Record(f"{path}:{number}", path.parent, {"id": id, "text": text, "audio": file, "split": split})
