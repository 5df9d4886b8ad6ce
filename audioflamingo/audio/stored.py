"""Audio that is a part of a file: a stretch of a recording, a member of a tar, a cell of an Arrow or Parquet table.

`load_audio` takes a `StoredAudio` as it takes a path, so rows of data sets, shards and tables are read where they lie.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audioflamingo.errors import ArgumentError, AudioError, require

SLACK_S = 0.1  # stated lengths are rounded; a stretch that a file lacks more of is an error
_OPEN_TABLES = 4


@dataclass(frozen=True)
class StoredAudio:
    """A part of a file.

    Attributes:
        path: the file.
        start_s: where the stretch begins.
        duration_s: how long it is; None takes all that follows.
        member: first byte and number of bytes of a recording inside an uncompressed archive.
        cell: column and row of a recording inside an Arrow or Parquet file.
        key: what a member or cell is called in messages.

    Raises:
        ArgumentError: a stretch that begins before the recording, or has no length.
    """

    path: str
    start_s: float = 0.0
    duration_s: float | None = None
    member: tuple[int, int] | None = None
    cell: tuple[str, int] | None = None
    key: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < float("inf"):
            raise ArgumentError(f"a stretch of audio begins at 0 s or later, not at {self.start_s!r} s.")
        if self.duration_s is not None and not 0 < self.duration_s < float("inf"):
            raise ArgumentError(f"a stretch of audio lasts more than 0 s, not {self.duration_s!r} s.")

    def __str__(self) -> str:
        name = f"{self.path}:{self.key}" if self.key else self.path
        if not self.is_stretch:
            return name
        return f"{name} from {self.start_s:g} s" + (
            "" if self.duration_s is None else f" for {self.duration_s:g} s"
        )

    @property
    def is_stretch(self) -> bool:
        """Whether it is less than a whole recording."""
        return self.start_s > 0 or self.duration_s is not None

    def source(self) -> str | bytes:
        """The whole recording, as `load_audio` takes it.

        Raises:
            AudioError: the file cannot be read any more.
        """
        if self.member is None and self.cell is None:
            return self.path
        try:
            if self.member is not None:
                first, size = self.member
                with open(self.path, "rb") as file:
                    file.seek(first)
                    data = file.read(size)
                if len(data) < size:
                    raise AudioError(f"{self}: the archive ends in the middle of it; fetch it again.")
                return data
            assert self.cell is not None
            return read_cell(self.path, *self.cell)
        except OSError as error:
            raise AudioError(f"{self}: cannot be read ({error}).") from error

    def digest(self, file_digest: str) -> str:
        """SHA-256 that tells what it holds apart, given that of its file."""
        data = self.source() if self.member is not None or self.cell is not None else file_digest
        digest = hashlib.sha256(data if isinstance(data, bytes) else data.encode())
        if self.is_stretch:
            digest.update(f"{self.start_s} {self.duration_s}".encode())
        return digest.hexdigest()

    def cut(self, blocks: Iterator[np.ndarray], rate: float) -> Iterator[np.ndarray]:
        """The stretch out of blocks (channels, n) of the whole recording; reads no further than its end.

        Raises:
            AudioError: the recording ends more than `SLACK_S` before the stretch.
        """
        first = round(self.start_s * rate)
        end = None if self.duration_s is None else round((self.start_s + self.duration_s) * rate)
        position = 0
        for block in blocks:
            start = max(0, first - position)
            piece = block[:, start : None if end is None else max(0, end - position)]
            position += block.shape[1]
            if piece.shape[1]:
                yield piece
            if end is not None and position >= end:
                return
        missing_s = ((first + 1 if end is None else end) - position) / rate
        if missing_s > (0 if end is None else SLACK_S):
            raise AudioError(
                f"{self}: the recording lasts {position / rate:.2f} s only. Correct the stretch, or leave it out."
            )


def path_of(audio: str | StoredAudio) -> str:
    """The file that holds it."""
    return audio if isinstance(audio, str) else audio.path


@functools.lru_cache(maxsize=_OPEN_TABLES)
def _arrow_column(path: str, column: str) -> Any:
    pyarrow = require("pyarrow", "data")
    ipc = require("pyarrow.ipc", "data", "pyarrow")
    mapped = pyarrow.memory_map(path)
    try:
        table = ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:
        table = ipc.open_file(mapped).read_all()
    return table.column(column)


@functools.lru_cache(maxsize=_OPEN_TABLES)
def _parquet_group(path: str, column: str, group: int) -> Any:
    parquet = require("pyarrow.parquet", "data", "pyarrow")
    return parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


@functools.lru_cache(maxsize=64)
def _group_ends(path: str) -> list[int]:
    parquet = require("pyarrow.parquet", "data", "pyarrow")
    metadata = parquet.ParquetFile(path).metadata
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]).tolist()


def read_cell(path: str, column: str, row: int) -> bytes:
    """The bytes of a recording in a table: a column of `{bytes, path}`, as Hugging Face writes it, or of bytes.

    Raises:
        AudioError: the cell holds none.
        MissingDependencyError: pyarrow is not installed.
    """
    if Path(path).suffix == ".parquet":
        ends = _group_ends(os.fspath(path))
        group = int(np.searchsorted(ends, row, side="right"))
        value = _parquet_group(path, column, group)[row - (ends[group - 1] if group else 0)].as_py()
    else:
        value = _arrow_column(path, column)[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise AudioError(f"{path}: row {row} of the column {column!r} holds no audio.")
    return data
