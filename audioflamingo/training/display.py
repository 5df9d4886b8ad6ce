"""The progress bar of a stage, and a stop at the next step on Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from audioflamingo.errors import require
from audioflamingo.training.learning_rate import Schedule
from audioflamingo.training.resume import Progress


class ProgressBar:
    """Shows the share done, loss, rate and time left; scores of a validation are printed above it."""

    def __init__(self, name: str, schedule: Schedule, is_shown: bool) -> None:
        self.schedule = schedule
        self._bar: Any = None
        if is_shown:
            style = "{desc}: {percentage:5.1f}% |{bar}| {postfix}"
            self._bar = require("tqdm", "train").tqdm(
                total=1.0, desc=name, bar_format=style, mininterval=0.5, smoothing=0
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, progress: Progress, values: dict[str, Any]) -> None:
        """Moves the bar to where the run is."""
        if self._bar is None:
            return
        left = self.schedule.seconds_left(progress.stage_step, progress.stage_s)
        rate = max(values["learning_rates"].values())
        text = f"step {progress.step} loss {values['loss']:.3f} rate {rate:.1e} {values['rows_per_s']:.1f} rows/s"
        self._bar.set_postfix_str(text + (f" {clock(left)} left" if left is not None else ""), refresh=False)
        by_clock = progress.stage_s / (60 * m) if (m := self.schedule.stage.max_minutes) else 0.0
        done = max(self.schedule.share_done(progress.stage_step, progress.stage_s), min(1.0, by_clock))
        self._bar.update(done - self._bar.n)

    def show(self, scores: dict[str, Any]) -> None:
        """Prints validation scores."""
        if self._bar is not None:
            texts = [f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float)]
            self._bar.write("validation: " + ", ".join(texts))


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
