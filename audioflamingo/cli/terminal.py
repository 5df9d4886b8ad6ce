"""Output: results go to standard output, all else to the error stream; a progress bar disturbs neither."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Terminal:
    """What is on the screen at the moment: at most one progress bar."""

    _progress: ClassVar[Progress | None] = None

    @classmethod
    def say(cls, text: str) -> None:
        """Prints a line to the error stream."""
        cls._write(text + "\n", sys.stderr)

    @classmethod
    def show(cls, text: str) -> None:
        """Prints text to standard output, at once."""
        cls._write(text, sys.stdout)

    @classmethod
    def _write(cls, text: str, out: TextIO) -> None:
        if cls._progress is not None and out.isatty() and text.endswith("\n"):
            cls._progress.console.print(text[:-1], markup=False, highlight=False, soft_wrap=True)
            return
        try:
            out.write(text)
        except UnicodeEncodeError:  # a terminal that is not UTF-8
            encoding = out.encoding or "ascii"
            out.write(text.encode(encoding, "replace").decode(encoding))
        out.flush()

    @classmethod
    @contextmanager
    def progress(cls, total: float | None, is_shown: bool) -> Iterator[ProgressBar]:
        """Shows a bar with the time left on the error stream, if that is a terminal.

        Args:
            total: amount of work; None if nobody knows.
            is_shown: False shows nothing.
        """
        if not (is_shown and sys.stderr.isatty()):
            yield ProgressBar(None, None)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        # One terminal, one console: lines that are printed then move the bar down.
        console = Console(stderr=not sys.stdout.isatty())
        progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        task = progress.add_task("", total=total)
        cls._progress = progress
        try:
            with progress:
                yield ProgressBar(progress, task)
        finally:
            cls._progress = None


class ProgressBar:
    """A bar, or nothing where none is shown."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def update(self, completed: float, description: str, total: float | None = None) -> None:
        """Moves the bar; `total`, the amount of work, is said where it was not known before."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=completed, description=description, total=total)
