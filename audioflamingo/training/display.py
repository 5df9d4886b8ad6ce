"""Progress bars, and a stop at the next step on Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from audioflamingo.training.learning_rate import Schedule
from audioflamingo.training.resume import Progress as RunProgress

DRAW_EVERY_S = 0.5


class Bar:
    """A line with the share done and a text. It is drawn between two calls, never by a thread: workers are forked.

    Args:
        name: at its beginning.
        total: what counts as done.
        is_shown: draw it.

    Attributes:
        done: how far it is.
    """

    def __init__(self, name: str, total: float, is_shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            TaskProgressColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(
            *columns, console=Console(stderr=True), auto_refresh=False, disable=not is_shown
        )
        self._task = self._progress.add_task(name, total=total, text="")
        self._drawn_at = 0.0
        self.done = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def move(self, done: float, text: str) -> None:
        """Moves it; drawn at most twice a second."""
        self.done = done
        is_due = time.monotonic() - self._drawn_at >= DRAW_EVERY_S
        self._progress.update(self._task, completed=done, text=text, refresh=is_due)
        if is_due:
            self._drawn_at = time.monotonic()

    def write(self, text: str) -> None:
        """Prints a line above it."""
        if not self._progress.disable:
            self._progress.console.print(text, markup=False, highlight=False)


class StageBar(Bar):
    """Shows the share done of a stage, loss, rate and time left; scores of a validation are printed above it."""

    def __init__(self, name: str, schedule: Schedule, is_shown: bool) -> None:
        super().__init__(name, 1.0, is_shown)
        self.schedule = schedule

    def update(self, progress: RunProgress, values: dict[str, Any]) -> None:
        """Moves the bar to where the run is."""
        left = self.schedule.seconds_left(progress.stage_step, progress.stage_s)
        rate = max(values["learning_rates"].values())
        text = f"step {progress.step} loss {values['loss']:.3f} rate {rate:.1e} {values['rows_per_s']:.1f} rows/s"
        by_clock = progress.stage_s / (60 * m) if (m := self.schedule.stage.max_minutes) else 0.0
        done = max(self.schedule.share_done(progress.stage_step, progress.stage_s), min(1.0, by_clock))
        self.move(done, text + (f" {clock(left)} left" if left is not None else ""))

    def show(self, scores: dict[str, float | None]) -> None:
        """Prints validation scores."""
        texts = [f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float)]
        self.write("validation: " + ", ".join(texts))


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the run can stop between two steps; the second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.is_set = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            with contextlib.suppress(TypeError):
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


def clock(seconds: float) -> str:
    """Seconds as `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
