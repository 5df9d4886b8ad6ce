"""From the path of a data set to its rows as plain values: JSON, CSV, tables of Arrow and Parquet, tar shards, folders.

Only text is read here. Audio inside of tables and shards is named by where it lies (`StoredAudio`) and read when it is
needed, in any order, so a run resumes on shards as exactly as on files.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audioflamingo.audio.stored import StoredAudio
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import DataError, require

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm", ".wma", ".aiff", ".mp4")
TABLES = (".parquet", ".arrow")
SHARDS = (".tar",)
LISTS = (".jsonl", ".json", ".csv", ".tsv")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Entry:
    """A row before anybody looked at it.

    Attributes:
        file: where it is.
        place: line, item, row or key in it.
        value: a mapping, or whatever stands there; an error where the text cannot be read.
        members: recordings that lie beside it in a shard, by name.
    """

    file: Path
    place: str
    value: Any
    members: Mapping[str, StoredAudio] = field(default_factory=dict)


def read_entries(config: DatasetConfig) -> Iterator[Entry]:
    """Rows of a data set, in order.

    Raises:
        DataError: there is no such file, it is damaged, or not of a kind that holds rows.
        MissingDependencyError: a table, and pyarrow is not installed.
    """
    for path in find_files(config):
        try:
            if path.suffix in TABLES:
                yield from _table_entries(path)
            elif path.suffix in SHARDS:
                yield from _shard_entries(path)
            elif path.suffix in (".csv", ".tsv"):
                yield from _csv_entries(path)
            else:
                yield from _json_entries(path)
        except (OSError, UnicodeDecodeError, csv.Error, tarfile.TarError) as error:
            raise DataError(f"cannot read {path}: {error}.") from error


def find_files(config: DatasetConfig) -> list[Path]:
    """Files of a data set, sorted.

    Raises:
        DataError: there are none, or several splits and none is chosen.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        return _files_of_folder(path, config.split)
    if config.split is not None:
        raise DataError(f"split {config.split!r}: {path} is one file; splits are for folders.")
    if path.exists():
        if path.name.endswith((".tar.gz", ".tgz", ".zip")):
            raise DataError(
                f"{path} is compressed as a whole, so its parts cannot be reached; unpack it to .tar."
            )
        return [path]
    text = str(path)
    if (match := _RANGE.search(text)) is not None:
        first, last = match[1], match[2]
        numbers = range(int(first), int(last) + 1)
        found = [Path(text.replace(match[0], str(number).zfill(len(first)))) for number in numbers]
        if missing := [str(file) for file in found if not file.is_file()]:
            raise DataError(f"cannot read {text}: {len(missing)} file(s) are missing, such as {missing[0]}.")
        return found
    if any(mark in text for mark in "*?["):
        found = sorted(map(Path, glob.glob(text, recursive=True)))
        if found:
            return found
    raise DataError(f"cannot read {path}: there is no such file or folder.")


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The files with rows of the first kind that the folder has: tables, shards, or `metadata` beside audio."""
    for suffixes in (TABLES, SHARDS):
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix in suffixes and not path.name.startswith("cache-") and path.is_file()
        )
        if found:
            return _of_split(folder, found, split)
    lists = sorted(path for path in folder.rglob("metadata.*") if path.suffix in LISTS)
    if lists:
        return _of_split(folder, lists, split)
    others = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder} holds no data set that is known: no .parquet, .arrow or .tar, and no metadata.csv or .jsonl. It has "
        f"{', '.join(others[:5]) or 'nothing'}; name the file with the rows. Benchmarks are for af3 evaluate "
        "--suite."
    )


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Those of a split, which is a folder (`train/...`) or the beginning of a name (`train-00000-of-00002.parquet`)."""

    def name_of(path: Path) -> str:
        parts = path.relative_to(folder).parts
        inner = [part for part in parts[:-1] if part != "data"]
        return inner[0] if inner else re.split(r"[-.]", parts[-1])[0]

    names = sorted({name_of(path) for path in files})
    if split is None:
        if len(names) > 1:
            raise DataError(f"{folder} holds several splits: {', '.join(names)}; choose one with split.")
        return files
    chosen = [path for path in files if name_of(path) == split]
    if not chosen:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(names)}.")
    return chosen


def _json_entries(path: Path) -> Iterator[Entry]:
    """Lines of JSONL, or items of one JSON list; a line that does not parse gives the error."""
    with path.open(encoding="utf-8-sig") as file:  # Windows puts a byte order mark ahead
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                values = json.load(file)
            except ValueError as error:
                raise DataError(f"{path} is not valid JSON: {error}.") from error
            yield from (Entry(path, str(item), value) for item, value in enumerate(values, start=1))
            return
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield Entry(path, str(line), json.loads(text))
                except ValueError as error:
                    yield Entry(path, str(line), error)


def _csv_entries(path: Path) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in reader:
            if None in row or None in row.values():
                number = len(reader.fieldnames or ())
                yield Entry(path, str(reader.line_num), ValueError(f"other than {number} columns"))
                continue
            yield Entry(
                path, str(reader.line_num), {name: value for name, value in row.items() if value != ""}
            )


def _table_entries(path: Path) -> Iterator[Entry]:
    """Rows of an Arrow or Parquet file; cells with audio are named, not read."""
    row = 0
    for batch, columns in _batches(path):
        for values in batch.to_pylist():
            value = dict(values)
            for column, has_paths in columns.items():
                inner = value.pop(column, None)
                stated = inner.get("path") if has_paths and isinstance(inner, dict) else None
                if stated and (path.parent / stated).is_file():
                    value[column] = stated
                else:
                    value[column] = StoredAudio(str(path), cell=(column, row), key=f"row {row}")
            yield Entry(path, f"row {row}", value)
            row += 1


def _batches(path: Path) -> Iterator[tuple[Any, dict[str, bool]]]:
    """Batches of a table without the bytes of its audio, and the columns of audio: whether each holds paths too."""
    pyarrow = require("pyarrow", "data")
    if path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", "data", "pyarrow")
        try:
            file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"cannot read {path}: {error}.") from error
        columns = _audio_columns(file.schema_arrow, pyarrow)
        wanted = [name for name in file.schema_arrow.names if name not in columns]
        wanted += [f"{name}.path" for name, has_paths in columns.items() if has_paths]
        if not wanted:
            raise DataError(f"{path} has no column beside its audio: there is nothing to learn.")
        yield from ((batch, columns) for batch in file.iter_batches(columns=wanted))
        return
    ipc = require("pyarrow.ipc", "data", "pyarrow")
    mapped = pyarrow.memory_map(str(path))
    try:
        table = ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:
        try:
            table = ipc.open_file(mapped).read_all()
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"cannot read {path}: {error}.") from error
    columns = _audio_columns(table.schema, pyarrow)
    kept = table.drop_columns([*columns])
    for name, has_paths in columns.items():
        if has_paths:
            paths = [{"path": text} for text in pyarrow.compute.struct_field(table[name], "path").to_pylist()]
            kept = kept.append_column(
                name, pyarrow.array(paths, pyarrow.struct([("path", pyarrow.string())]))
            )
    yield from ((batch, columns) for batch in kept.to_batches())


def _audio_columns(schema: Any, pyarrow: Any) -> dict[str, bool]:
    found = {}
    for column in schema:
        kind = column.type
        if pyarrow.types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}:
            found[column.name] = "path" in {kind.field(i).name for i in range(kind.num_fields)}
        elif pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            found[column.name] = False
    return found


def _shard_entries(path: Path) -> Iterator[Entry]:
    """Samples of a WebDataset shard: members of one name up to its first dot, one after the other."""
    key, value, members = "", {}, {}  # type: str, dict[str, Any], dict[str, StoredAudio]
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            if not info.isfile():
                continue
            folder, _, base = info.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            if name != key:
                if value or members:
                    yield Entry(path, key, value, members)
                key, value, members = name, {}, {}
            suffix = f".{suffix.lower()}"
            if suffix in AUDIO_SUFFIXES:
                stored = StoredAudio(str(path), member=(info.offset_data, info.size), key=info.name)
                members |= {info.name: stored, base: stored}
            elif suffix in (".json", ".txt"):
                file = archive.extractfile(info)
                assert file is not None
                text = file.read().decode("utf-8-sig")
                try:
                    value |= {"text": text.strip()} if suffix == ".txt" else json.loads(text)
                except (ValueError, TypeError) as error:
                    value["error"] = error
    if value or members:
        yield Entry(path, key, value, members)
