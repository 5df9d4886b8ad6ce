"""The output folder of a corpus: what was asked for, a part for each finished shard, and the whole.

run.json             model, options and files that the parts belong to
parts/00000000.jsonl records of the first shard, and so on; each appears whole or not at all
transcripts.jsonl    all records in the order of the files, written when every part is there
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from audioflamingo.corpus.records import CorpusFile, Shard
from audioflamingo.errors import ArgumentError, OutputError, reason_of
from audioflamingo.files import differences, write_whole

RUN_FILE = "run.json"
PARTS_FOLDER = "parts"
WHOLE_FILE = "transcripts.jsonl"

CHECKPOINT_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.safetensors")
NUM_SAMPLES = 64  # stretches that are read of a large file: training changes every one of them
SAMPLE_BYTES = 16384


def describe_files(files: Sequence[CorpusFile]) -> dict[str, Any]:
    """What `run.json` says about the files: their number and a digest of their names in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.source]).encode())
    return {"num_files": len(files), "files_sha256": digest.hexdigest()}


def fingerprint_checkpoint(folder: Path, patterns: Sequence[str] = CHECKPOINT_PATTERNS) -> str:
    """A digest of the names, sizes and contents of a checkpoint's files; of large ones, samples of the content."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= NUM_SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(NUM_SAMPLES):
                file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class CorpusFolder:
    """Opens the folder for a run: a new one, or one that the same run was stopped in.

    Args:
        folder: made if it is not there.
        run: what the results depend on; JSON.
        overwrite: throw away what another run left there.

    Raises:
        ArgumentError: it holds the parts of another run.
        OutputError: it cannot be written to.
    """

    def __init__(self, folder: Path, run: dict[str, Any], overwrite: bool = False) -> None:
        self._folder = folder
        self._parts = folder / PARTS_FOLDER
        self.path = folder / WHOLE_FILE
        run = json.loads(json.dumps(run))
        try:
            if overwrite:
                self._clear()
            known = self._read_run()
            if known is not None and known != run:
                raise ArgumentError(
                    f"{str(folder)!r} holds the transcripts of another run: {differences(known, run)}. Choose "
                    "another --output-dir, or --overwrite to start again."
                )
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot use the folder {str(folder)!r}: {reason_of(error)}. Choose another --output-dir."
            ) from error
        if known is None:
            write_whole(folder / RUN_FILE, [(json.dumps(run, indent=2) + "\n").encode()])

    def _clear(self) -> None:
        """Removes the parts first: without them the rest is harmless."""
        if self._parts.exists():
            shutil.rmtree(self._parts)
        self.path.unlink(missing_ok=True)
        (self._folder / RUN_FILE).unlink(missing_ok=True)

    def _read_run(self) -> dict[str, Any] | None:
        path = self._folder / RUN_FILE
        if not path.exists():
            return None
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            run = None
        if not isinstance(run, dict):
            raise ArgumentError(f"{str(path)!r} is not of this program: choose another --output-dir.")
        return run

    def is_done(self, shard: Shard) -> bool:
        """Whether the part of a shard is there."""
        return self._part(shard).exists()

    def write_part(self, shard: Shard, records: Iterable[str]) -> None:
        """Puts the records of a shard in place.

        Raises:
            OutputError: they cannot be written.
        """
        write_whole(self._part(shard), (record.encode() for record in records))

    def merge(self, shards: Sequence[Shard]) -> int:
        """Writes all records into one file and returns how many of them are errors.

        Raises:
            OutputError: the file cannot be written, or a part does not hold one record for each of its files.
        """
        num_failed = 0

        def lines() -> Iterable[bytes]:
            nonlocal num_failed
            for shard in shards:
                content = self._part(shard).read_bytes()
                num_failed += self._count_errors(shard, content)
                yield content

        write_whole(self.path, lines())
        return num_failed

    def _count_errors(self, shard: Shard, content: bytes) -> int:
        try:
            records = [json.loads(line) for line in content.splitlines()]
            if [record["source"] for record in records] == [file.name for file in shard.files]:
                return sum(record["error"] is not None for record in records)
        except (ValueError, TypeError, KeyError):
            pass
        raise OutputError(
            f"{str(self._part(shard))!r} does not hold one record for each of its files: somebody changed it. "
            "Delete it and run the same command again."
        )

    def _part(self, shard: Shard) -> Path:
        return self._parts / f"{shard.index:08d}.jsonl"
