"""Every error and warning of the package.

A caller who wants one net catches `AudioFlamingoError`. Each class also derives from the built-in exception that a
Python user would expect (`ValueError`, `TypeError`, `ImportError`), so that plain handlers keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AudioFlamingoError(Exception):
    """Base of all errors that the package raises on purpose."""


class AudioError(AudioFlamingoError, ValueError):
    """Audio that cannot be read, decoded or used: the message names the source and what is wrong with it."""


class AudioTooLongError(AudioError):
    """A clip is longer than the model takes and the caller asked for an error in place of a cut."""


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


class OutputError(AudioFlamingoError, OSError):
    """A file that cannot be written: the folder is read-only, the disk is full."""


class MissingDependencyError(AudioFlamingoError, ImportError):
    """An optional package is needed: the message holds the line that installs it."""


class ClusterError(AudioFlamingoError, RuntimeError):
    """A Ray cluster that cannot be reached, or that stopped in the middle of a job."""


class AudioFlamingoWarning(UserWarning):
    """Category of every warning of the package: truncation, fallbacks, options without effect."""


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
