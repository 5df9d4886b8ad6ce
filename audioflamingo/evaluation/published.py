"""Data sets of benchmarks as they are published: JSON, JSONL, CSV, parquet, folders of transcripts; on disk or the hub.

Only files are known here; what their columns mean is `suites`'. Audio inside parquet files is read when it is needed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from audioflamingo.errors import DataError, require
from audioflamingo.evaluation.scoring import EXTRA
from audioflamingo.hub import resolve_dataset

TABLES = (".json", ".jsonl", ".csv", ".parquet")
TRANSCRIPTS = "*.trans.txt"
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".m4a", ".opus")


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


@dataclass(frozen=True)
class ParquetClip:
    """Encoded audio inside a parquet file.

    Attributes:
        path: the file.
        column: holds structs with the key `bytes`.
        row: counted from the file's first.
    """

    path: str
    column: str
    row: int

    def read(self) -> bytes:
        """The encoded audio.

        Raises:
            DataError: there is none.
        """
        values, first = _row_group(self.path, self.column, self._group)
        value = values[self.row - first].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise DataError(f"{self.path}: row {self.row + 1} has no audio in its column {self.column!r}.")
        return content

    @property
    def _group(self) -> int:
        end = 0
        metadata = _open_parquet(self.path).metadata
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            if self.row < end:
                return group
        raise DataError(f"{self.path} has {end} rows, {self.row + 1} asked for: the file has changed.")


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
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise DataError(f"{path} is none of {', '.join(TABLES)}.")
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # Clotho-AQA's tables
    try:
        if suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines(keepends=True)))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {suffix[1:]}: {error}.") from error
    for number, values in enumerate(rows, start=1):
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: a row must be an object, this is a {type(values).__name__}.")
        yield Record(f"{path}:{number}", path.parent, values)


def _read_parquet(path: Path) -> Iterator[Record]:
    """Rows without their audio, for which a `ParquetClip` stands."""
    file = _open_parquet(str(path))
    arrow = require("pyarrow", EXTRA)
    fields = list(file.schema_arrow)
    clips = [
        field.name
        for field in fields
        if (arrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        or arrow.types.is_binary(field.type)
    ]
    columns = [field.name for field in fields if field.name not in clips]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for values in batch.to_pylist():
            audio = {name: ParquetClip(str(path), name, number) for name in clips}
            number += 1
            yield Record(f"{path}:{number}", path.parent, {**values, **audio})


@lru_cache(maxsize=8)
def _open_parquet(path: str) -> Any:
    try:
        return require("pyarrow.parquet", EXTRA).ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as parquet: {error}.") from error


@lru_cache(maxsize=2)
def _row_group(path: str, column: str, group: int) -> tuple[Any, int]:
    """A column's values in one row group, and the number of its first row. Neighbours are asked for together."""
    file = _open_parquet(path)
    first = sum(file.metadata.row_group(i).num_rows for i in range(group))
    return file.read_row_group(group, columns=[column]).column(column), first


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
