"""The command `af3`. Nothing heavy is imported before a command needs it, so `--help` answers at once."""

from __future__ import annotations


def main() -> None:
    """Runs the command with the arguments of the process, and exits."""
    try:
        from audioflamingo.cli.commands import app

        app(prog_name="af3")
    except KeyboardInterrupt:  # while modules are imported
        raise SystemExit(130) from None
