"""What a run writes about itself: `log.jsonl`, TensorBoard events, curves as PNG, a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from audioflamingo.errors import OutputError, reason_of, require
from audioflamingo.figures import new_figure, save_png
from audioflamingo.files import write_text

LOG_FILE = "log.jsonl"
CURVES_FILE = "curves.png"


class MetricsLog:
    """Lines of `log.jsonl`: `{"kind": "train" | "validation", "step": ..., ...}`.

    Args:
        folder: the run's folder.
        step: the run goes on from here; later lines of an interrupted run are cut off.
        tensorboard: also write event files.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = True) -> None:
        self.folder = folder
        self.path = folder / LOG_FILE
        if self.path.exists():
            kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._writer: Any = None
        if tensorboard:
            module = require("torch.utils.tensorboard", "train", "tensorboard")
            self._writer = module.SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else None
            )

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds one line, and its numbers to TensorBoard.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise OutputError(
                f"cannot write to {str(self.path)!r}: {reason_of(error)}. Make room; the same command goes on from the "
                "last checkpoint."
            ) from error
        if self._writer is not None:
            for name, value in values.items():
                numbers = value.items() if isinstance(value, dict) else [("", value)]
                for part, number in numbers:
                    if isinstance(number, int | float):
                        self._writer.add_scalar(f"{kind}/{name}" + (f"/{part}" if part else ""), number, step)

    def entries(self) -> list[dict[str, Any]]:
        """What is logged so far."""
        return read_log(self.path) if self.path.exists() else []

    def plot(self, folder: Path | None = None) -> None:
        """Writes the curves as they are now, by default beside the log; none where nothing is logged yet."""
        if self.path.exists():
            plot_curves(self.path, (folder or self.folder) / CURVES_FILE)

    def close(self) -> None:
        """Flushes what is open."""
        if self._writer is not None:
            self._writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a log; a last line that was cut short by a crash is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def plot_curves(log: Path, target: Path) -> None:
    """Draws training and validation loss, and word error rate, over the steps.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    entries = read_log(log)
    figure = new_figure(11, 4)
    losses, scores = figure.subplots(1, 2)
    drawn = (
        (losses, "train", "answer_loss", "training"),
        (losses, "train", "ctc_loss", "training, CTC per character"),
        (losses, "validation", "loss", "validation"),
        (scores, "validation", "wer", "word error rate"),
        (scores, "validation", "accuracy", "accuracy"),
    )
    for axes, kind, name, label in drawn:
        points = [(e["step"], e[name]) for e in entries if e["kind"] == kind and e.get(name) is not None]
        if points:
            style = {"linewidth": 0.8} if kind == "train" else {"marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for axes, title in ((losses, "loss"), (scores, "scores on validation rows")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_png(figure, target, dpi=110)
