"""Errors and warnings of a command as one line each; the traceback only with `--debug`."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from audioflamingo.cli.terminal import Terminal
from audioflamingo.errors import AudioFlamingoError, AudioFlamingoWarning

DEBUG = "audioflamingo.debug"  # keys of the context's shared notes
QUIET = "audioflamingo.quiet"

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class FriendlyGroup(TyperGroup):
    """Turns what a command raises into one line on the error stream and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries' advice to programmers
            warnings.simplefilter("default", AudioFlamingoWarning)
            warnings.showwarning = lambda message, *_args, **_kwargs: _warn(ctx, str(message))
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                Terminal.say("interrupted.")
                raise typer.Exit(EXIT_INTERRUPTED) from None
            except BrokenPipeError:  # the reader of our output has gone, as in `af3 transcribe x | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(EXIT_FAILED) from None
            except Exception as error:
                if not is_expected(error):
                    raise
                report(ctx, error)
                raise typer.Exit(EXIT_FAILED) from None


def is_expected(error: BaseException) -> bool:
    """Whether an error is the input's or the machine's; others are ours and keep their traceback."""
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, AudioFlamingoError | OSError) or is_memory


def describe(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text}). Use a smaller --batch-size, --dtype bfloat16, or another --device."
    return text


def report(ctx: Any, error: BaseException) -> None:
    """Prints an error in one line; with `--debug` its traceback first."""
    if ctx.find_root().meta.get(DEBUG):
        Terminal.say("".join(traceback.format_exception(error)).rstrip())
    Terminal.say(f"error: {describe(error)}")


def _warn(ctx: Any, message: str) -> None:
    if not ctx.find_root().meta.get(QUIET):
        Terminal.say(f"warning: {' '.join(message.split())}")
