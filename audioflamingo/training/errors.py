"""Errors of training and evaluation, and the import of the optional packages that they need."""

from __future__ import annotations

import importlib
from typing import Any

from audioflamingo.errors import AudioFlamingoError, MissingDependencyError

INSTALL_LINE = "pip install audioflamingo[train]"


class DataError(AudioFlamingoError, ValueError):
    """A data set, or a row of it, that cannot be used: the message names file and line."""


class TrainingError(AudioFlamingoError, RuntimeError):
    """A run that cannot go on; the last checkpoint is untouched."""


class NonFiniteLossError(TrainingError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        ids: ids of the rows of the step, of all processes.
    """

    def __init__(self, message: str, ids: list[str]) -> None:
        super().__init__(message)
        self.ids = ids


def require(module: str, package: str | None = None) -> Any:
    """Imports an optional module.

    Raises:
        MissingDependencyError: it is not installed; the message holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.split(".")[0]
        raise MissingDependencyError(
            f"training and evaluation need {name}: {INSTALL_LINE} ({error})"
        ) from error
