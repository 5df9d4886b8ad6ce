#!/usr/bin/env python3
"""Builds the data of the built-in model: `python recipes/nano/build_data.py --data-dir DIR`.

Any Python 3.11 starts it; it installs what it needs (step `setup`) and goes on in an environment of its own.
Every step is resumable: stop it at any time, run the same command again, and it makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from nano_data import packages, setup, splits, steps
from nano_data.store import write_atomic

STEPS: dict[str, Callable[[steps.Build], str]] = {
    "encoder": steps.make_encoder,
    "text": steps.make_text,
    "human": steps.make_human,
    "quiet": steps.make_quiet,
    "sounds": steps.make_sounds,
    "instruments": steps.make_instruments,
    "speech": steps.make_speech,
    "conversations": steps.make_conversations,
    "manifest": steps.make_manifest,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the data (about 20 GB)")
    parser.add_argument(
        "--env-dir", type=Path, help="Python environment to make or use (default: DATA_DIR/env)"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=["setup", *STEPS], help="only these steps (default: all)"
    )
    parser.add_argument("--engines", nargs="+", help="speech: only these engines")
    parser.add_argument("--workers", type=int, default=1, help="processes for synthesis (default: 1)")
    parser.add_argument(
        "--hours-scale", type=float, default=1.0, help="factor of the planned hours of training speech"
    )
    parser.add_argument(
        "--draw",
        help="a name: make other tests out of what is held out, in DATA_DIR/NAME (encoder and training data stay)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    data_dir = arguments.data_dir.resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    wanted = arguments.steps or [
        "setup",
        *(name for name in STEPS if name != "encoder" or not arguments.draw),
    ]
    if "setup" in wanted and not setup.is_inside(arguments.env_dir or data_dir / "env"):
        start = time.perf_counter()
        setup.install_debian_packages()
        packages.unpack_data_packages(data_dir)
        setup.ensure_environment(arguments.env_dir or data_dir / "env")
        print(f"[setup] done in {time.perf_counter() - start:.0f} s", flush=True)
    setup.restart_in(setup.ensure_environment(arguments.env_dir or data_dir / "env"))
    unpacked = setup.unpacked_dir(data_dir)
    if arguments.draw:
        os.environ[splits.DRAW_VARIABLE] = arguments.draw
        data_dir = data_dir / arguments.draw
    build = steps.Build(data_dir, unpacked, arguments.workers, arguments.hours_scale, arguments.engines)
    for name, step in STEPS.items():
        if name in wanted:
            start = time.perf_counter()
            summary = step(build)
            seconds = time.perf_counter() - start
            print(f"[{name}] {summary} ({seconds:.0f} s)", flush=True)
            log = data_dir / "log" / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
            write_atomic(log, f"{summary}\n{seconds:.0f} s, {arguments.workers} workers\n")


if __name__ == "__main__":
    main()
