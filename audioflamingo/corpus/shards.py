"""Files of a corpus, cut into the pieces that workers take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class CorpusFile:
    """One audio file.

    Attributes:
        name: what its record is called; no two files of a corpus share one.
        source: an absolute path or a URL that every node of the cluster can read.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Shard:
    """Files that one worker transcribes together; what is done again if it dies meanwhile.

    Attributes:
        index: its place in the corpus, from 0 on.
        files: one or more.
    """

    index: int
    files: tuple[CorpusFile, ...]

    def to_row(self) -> dict[str, int | str]:
        """A row of a Ray data set; the files as JSON, which every version of Arrow keeps as it is."""
        return {"index": self.index, "files": json.dumps([(file.name, file.source) for file in self.files])}

    @classmethod
    def from_row(cls, row: dict[str, int | str]) -> Self:
        """What `to_row` was called on."""
        files = tuple(CorpusFile(name, source) for name, source in json.loads(str(row["files"])))
        return cls(int(row["index"]), files)


def cut_shards(files: Sequence[CorpusFile], shard_size: int) -> list[Shard]:
    """Cuts files into shards of `shard_size`, in order; the last one may be smaller."""
    starts = range(0, len(files), shard_size)
    return [Shard(index, tuple(files[start : start + shard_size])) for index, start in enumerate(starts)]
