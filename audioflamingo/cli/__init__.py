"""The command `af3`. Nothing heavy is imported before a command needs it, so `--help` answers at once."""

from __future__ import annotations

import gc

# Objects made between two searches for cycles. Python's own number makes 366 searches while torch is imported, of
# objects that stay: 0.17 s of two on one machine, and 0.08 s with this one.
_OBJECTS_BETWEEN_SEARCHES = 50_000


def main() -> None:
    """Runs the command with the arguments of the process, and exits."""
    gc.set_threshold(_OBJECTS_BETWEEN_SEARCHES)
    try:
        from audioflamingo.cli.commands import app

        app(prog_name="af3")
    except KeyboardInterrupt:  # while modules are imported
        raise SystemExit(130) from None
