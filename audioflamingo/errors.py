"""Every error and warning of the package.

A caller who wants one net catches `AudioFlamingoError`. Each class also derives from the built-in exception that a
Python user would expect (`ValueError`, `TypeError`, `ImportError`), so that plain handlers keep working.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = str(Path(__file__).parent)


class AudioFlamingoError(Exception):
    """Base of all errors that the package raises on purpose."""


def reason_of(error: Exception) -> str:
    """What went wrong with a file that the message names already, without the name and the number of the error."""
    return getattr(error, "strerror", None) or str(error)


class AudioError(AudioFlamingoError, ValueError):
    """Audio that cannot be read, decoded or used: the message names the source and what is wrong with it."""


class AudioTooLongError(AudioError):
    """A clip is longer than the model takes and the caller asked for an error in place of a cut."""


class FetchError(AudioError):
    """An address that may not be fetched from, or that gives no file.

    Attributes:
        reason: what is wrong, in a few words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(AudioFlamingoError, ValueError):
    """A configuration value that is impossible or that this package does not implement."""


class CheckpointError(AudioFlamingoError, ValueError):
    """A checkpoint folder that is absent, damaged, incomplete or of another model."""


class PromptError(AudioFlamingoError, ValueError):
    """A conversation or prompt that cannot be rendered, or that does not fit its audio."""


class ContextLengthError(PromptError):
    """More tokens than the language model's context holds."""


class ArgumentError(AudioFlamingoError, TypeError, ValueError):
    """An unknown keyword, or a value of the wrong type or range."""


class DeviceError(AudioFlamingoError, ValueError):
    """A device that is absent, or a dtype that it cannot run."""


class DataError(AudioFlamingoError, ValueError):
    """A data set, or a row of it, that cannot be used: the message names file and line."""


class TrainingError(AudioFlamingoError, RuntimeError):
    """A training run that cannot go on; the last checkpoint is untouched."""


class NonFiniteLossError(TrainingError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        ids: ids of the rows of the step, of all processes.
    """

    def __init__(self, message: str, ids: list[str]) -> None:
        super().__init__(message)
        self.ids = ids


class OutputError(AudioFlamingoError, OSError):
    """A file that cannot be written: the folder is read-only, the disk is full."""


class MissingDependencyError(AudioFlamingoError, ImportError):
    """An optional package is needed: the message holds the line that installs it."""


class ClusterError(AudioFlamingoError, RuntimeError):
    """A Ray cluster that cannot be reached, or that stopped in the middle of a job."""


class EngineStoppedError(AudioFlamingoError):
    """The engine was stopped before it could give the answer."""


class AudioFlamingoWarning(UserWarning):
    """Category of every warning of the package: truncation, fallbacks, options without effect."""


def warn(message: str) -> None:
    """Warns, and names the line outside of the package that led there."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AudioFlamingoWarning, stacklevel=level)


def unknown_arguments(where: str, names: Iterable[str], allowed: Iterable[str]) -> ArgumentError:
    """Builds the error for keywords that `where` does not take.

    Args:
        where: what was called, for example `"generate()"`.
        names: the unknown keywords.
        allowed: every keyword that would have been accepted.

    Returns:
        The error, not raised, with the closest allowed keyword beside each unknown one.
    """
    allowed = sorted(allowed)
    described = []
    for name in names:
        close = difflib.get_close_matches(name, allowed, n=1)
        described.append(f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name))
    return ArgumentError(
        f"{where} got unknown argument(s) {', '.join(described)}; it takes: {', '.join(allowed)}."
    )


def refuse_further_keywords(
    where: str,
    given: Mapping[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    remedy: str = "; leave it out",
) -> None:
    """Takes keywords of transformers that are not implemented, at the values at which they change nothing.

    Args:
        where: what was called.
        given: keywords and values.
        neutral: keywords of transformers, and their values that ask for nothing; None always does.
        remedy: end of the message.

    Raises:
        ArgumentError: a keyword that is unknown, or has another value.
    """
    if unknown := given.keys() - neutral.keys():
        raise unknown_arguments(f"{where}()", sorted(unknown), neutral)
    for name, value in given.items():
        if value is not None and value not in neutral[name]:
            raise ArgumentError(f"{where}({name}={value!r}) is not implemented{remedy}.")


def require(module: str, extra: str, package: str | None = None) -> Any:
    """Imports an optional package.

    Args:
        module: what to import.
        extra: the extra of this package that installs it, as in `pip install 'audioflamingo[extra]'`.
        package: what messages call it, where that is not the name of the module that is not there.

    Raises:
        MissingDependencyError: it is not installed; the message holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or (error.name or module).split(".")[0]
        raise MissingDependencyError(
            f"this needs the package {name}: pip install 'audioflamingo[{extra}]' ({error})"
        ) from error


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
