"""Pictures with matplotlib, an optional package: drawn without a screen, written as PNG whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from audioflamingo.errors import require
from audioflamingo.files import write_whole


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of so many inches that finds its own margins.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure.

    Raises:
        OutputError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_whole(path, picture.getvalue())
