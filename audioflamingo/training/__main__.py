"""`python -m audioflamingo.training CONFIG.yaml`: trains; run it again to go on after an interruption."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from audioflamingo.errors import AudioFlamingoError


def run_training(
    config: str, overrides: Sequence[str] = (), *, fresh: bool = False, quiet: bool = False
) -> str:
    """Trains as the YAML file says and returns one line about the result; what the command line calls."""
    from audioflamingo.training.config import load_config
    from audioflamingo.training.trainer import train

    result = train(load_config(config, overrides), fresh=fresh, show_progress=not quiet)
    best = (
        ""
        if result.best is None
        else f"; best {result.best:.4f} at step {result.best_step} in {result.best_dir}"
    )
    return f"{result.step} steps done; the model is in {result.last_dir}{best}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(prog="python -m audioflamingo.training", description=__doc__)
    parser.add_argument("config", help="YAML file; recipes/nano/train.yaml is a commented example")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a value, for example stages.0.max_minutes=20 (repeatable)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the output folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        print(run_training(options.config, options.overrides, fresh=options.fresh, quiet=options.quiet))
    except AudioFlamingoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; a checkpoint is written, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
