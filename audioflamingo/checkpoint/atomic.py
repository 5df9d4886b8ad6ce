"""Files that replace older ones all together: written and synced beside them first, then renamed.

A failure while writing (a full disk, Ctrl-C, a killed process) leaves the older files as they were. The
renames are several steps; what they leave when the machine stops between two of them is recognised by
`weights.find_tensors`, through the save id in the names of the files that were not yet renamed and inside
those that were.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from audioflamingo.checkpoint.weights import TEMPORARY_PATTERN
from audioflamingo.errors import CheckpointError
from audioflamingo.files import sync_folder


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
