#!/usr/bin/env python3
"""Trains the built-in model: `python recipes/nano/train_model.py --data-dir DIR`, after build_data.py.

Makes the untrained model in DIR/model if it is not there, then trains as train.yaml says. The same command goes on
after an interruption.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parent
# What the tokenizer is trained on: kinds whose wordings repeat the most are left out.
TEXT_KINDS = ("transcription", "follow_up", "text", "instrument_choice", "compare")


def make_model(data_dir: Path) -> None:
    """The untrained model: the given encoder, a tokenizer of its own, the rest random."""
    from audioflamingo.training.new_model import NewModelConfig, new_model, read_texts

    shape = NewModelConfig(
        vocab_size=1500,
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
    )
    texts = read_texts([data_dir / f"train_{kind}.jsonl" for kind in TEXT_KINDS])
    new_model(data_dir / "model", data_dir / "encoder.safetensors", texts, shape)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that build_data.py filled")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that share each step (default: 1)"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a value of train.yaml, for example stages.1.max_minutes=20 (repeatable)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    data_dir = arguments.data_dir.resolve()
    if not (data_dir / "model" / "model.safetensors").exists():
        make_model(data_dir)
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    settings = [option for value in arguments.overrides for option in ("--set", value)]
    command = [*launcher, "-m", "audioflamingo.cli", "train", str(RECIPE / "train.yaml"), *settings]
    start = time.perf_counter()
    code = subprocess.run(command, env={**os.environ, "NANO_DATA": str(data_dir)}, check=False).returncode
    print(f"[train] exit code {code} after {time.perf_counter() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
