"""Files that are written whole or not at all, and the small text files of a checkpoint folder.

`write_whole` and `write_text` are for one file, `replacing` for one that others write. `AtomicFolder` replaces several
together: they are written and synced beside the older ones first, then renamed. A failure while writing (a full disk,
Ctrl-C, a killed process) leaves the older files as they were. The renames are several steps; what they leave when the
machine stops between two of them is recognised by `checkpoint.weights.find_tensors`, through the save id in the names
of the files that were not yet renamed and inside those that were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from audioflamingo.errors import CheckpointError, DataError, OutputError, reason_of

TEMPORARY_PATTERN = re.compile(r"\.saving-(?P<save_id>[0-9a-f]{32})-.+")


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


def differences(known: dict[str, Any], run: dict[str, Any]) -> str:
    """What tells two descriptions of a run apart, in words: the keys, with both values where those are short."""
    texts = []
    for key in sorted(known.keys() | run.keys()):
        old, new = known.get(key), run.get(key)
        if old != new:
            values = f" ({json.dumps(old)}, now {json.dumps(new)})"
            texts.append(key + (values if len(values) < 100 and not key.endswith("sha256") else ""))
    return "other " + ", ".join(texts)


def fingerprint_file(path: str) -> str:
    """SHA-256 of a file, whatever its name and times; "" for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


class FileWatch:
    """Notices files that change while a run reads them: by size and time, and where these differ by content.

    Args:
        paths: of the files, as they are when the run begins.
        fingerprints: of those whose content is known, by path; others have changed when their time has.
    """

    def __init__(self, paths: Iterable[str], fingerprints: Mapping[str, str] | None = None) -> None:
        self._seen = {path: _state(path) for path in paths}
        self._fingerprints = dict(fingerprints or {})

    def check(self, paths: Iterable[str]) -> None:
        """Makes sure that files are what they were; a missing one is for its reader to tell.

        Raises:
            DataError: one has changed.
        """
        for path in paths:
            before, now = self._seen.get(path), _state(path)
            if before is None or now is None or before == now:
                continue
            known = self._fingerprints.get(path)
            if known is None or fingerprint_file(path) != known:
                raise DataError(f"{path} has changed since the run began. Put it back, or start again.")
            self._seen[path] = now

    def fingerprint(self, path: str) -> str:
        """A file's fingerprint, as it was read first."""
        if path not in self._fingerprints:
            self._fingerprints[path] = fingerprint_file(path)
        return self._fingerprints[path]


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


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


def write_whole(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: where it goes.
        content: all of it, or its pieces in order.

    Raises:
        OutputError: it cannot be written. What was there before is unchanged.
    """
    try:
        with replacing(path) as temporary, temporary.open("xb") as file:
            file.writelines((content,) if isinstance(content, bytes) else content)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {str(path)!r}: {reason_of(error)}. Check the permissions and the free "
            "space, or choose another folder. Nothing that was there before has changed.",
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes the renames reach the disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicFolder:
    """Replaces files of a folder at the end of a `with` block, or none of them if the block fails.

    One process at a time may write to a folder; leftovers of a process that was killed are cleared away.

    Args:
        folder: where the files go; made if it is not there.

    Attributes:
        save_id: 32 hex digits, new each time.

    Raises:
        CheckpointError: the folder cannot be written to, or is a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.save_id = uuid.uuid4().hex
        self._written: list[str] = []
        self._stale: list[Path] = []

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"cannot save to {str(self.folder)!r}: it is a file, not a folder.")
        with _saving_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        """Writes a file under a temporary name and waits for the disk; `fill` gets it open."""
        target = self.folder / name
        if target.is_dir():
            raise CheckpointError(f"cannot save {name}: {str(target)!r} is a folder.")
        self._written.append(name)
        with _saving_to(self.folder), self._temporary(name).open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())

    def remove_at_end(self, paths: Iterable[Path]) -> None:
        """Marks older files for removal once the new ones are in place."""
        self._stale.extend(path for path in paths if path.name not in self._written)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._remove_temporaries()
            return
        leftovers = [path for path in self.folder.glob(".saving-*") if TEMPORARY_PATTERN.fullmatch(path.name)]
        renames = [(self._temporary(name), self.folder / name) for name in self._written]
        own = {temporary for temporary, _ in renames}
        remaining = list(renames)
        try:
            _rename(remaining)
            for path in (*self._stale, *(path for path in leftovers if path not in own)):
                path.unlink(missing_ok=True)
        except OSError as failure:
            is_half_done = len(remaining) < len(renames)
            if not is_half_done:
                self._remove_temporaries()
            state = "holds half of the new files: save again" if is_half_done else "is as it was before"
            raise CheckpointError(
                f"cannot put the files in place: {failure}; the folder {str(self.folder)!r} {state}."
            ) from failure
        sync_folder(self.folder)

    def _remove_temporaries(self) -> None:
        for name in self._written:
            with contextlib.suppress(OSError):
                self._temporary(name).unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self.folder / f".saving-{self.save_id}-{name}"


def _rename(remaining: list[tuple[Path, Path]]) -> None:
    """Renames all files, taking each off the list; a Ctrl-C meanwhile is raised after the last one."""
    interrupt: KeyboardInterrupt | None = None
    while remaining:
        temporary, target = remaining[0]
        try:
            os.replace(temporary, target)
            del remaining[0]
        except KeyboardInterrupt as error:
            interrupt = error
            if not temporary.exists():
                del remaining[0]
    if interrupt is not None:
        raise interrupt


@contextlib.contextmanager
def _saving_to(folder: Path) -> Iterator[None]:
    """Turns the system's errors into ours."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {str(folder)!r}: {error}. What it held is unchanged; check the permissions and "
            "the free space, or choose another folder."
        ) from error
