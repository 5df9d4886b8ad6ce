"""The command `af3`. Nothing heavy is imported before a command needs it, so `--help` answers at once."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading

# Objects made between two searches for cycles. Python's own number makes 366 searches while torch is imported, of
# objects that stay: 0.17 s of two on one machine, and 0.08 s with this one.
_OBJECTS_BETWEEN_SEARCHES = 50_000
# What these write is closed when they end; of `train` and `serve` that is not known.
_SHORT_COMMANDS = ("transcribe", "ask")


def main() -> None:
    """Runs the command with the arguments of the process, and ends the process."""
    gc.set_threshold(_OBJECTS_BETWEEN_SEARCHES)
    asked = next(iter(sys.argv[1:]), None)
    try:
        from audioflamingo.cli.app import build_app

        build_app(asked)(prog_name="af3")
    except KeyboardInterrupt:  # while modules are imported
        raise SystemExit(130) from None
    except SystemExit as end:
        if asked in _SHORT_COMMANDS and "torch" in sys.modules and isinstance(end.code, int | None):
            _end_process(end.code or 0)
        raise


def _end_process(code: int) -> None:
    """Ends the process once all that is due at its end is done, without taking torch apart: 0.1 s of 1.8."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the other threads, as the interpreter does
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # the interpreter says what is to be said of output that nobody takes
        return
    os._exit(code)
