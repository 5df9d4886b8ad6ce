#!/usr/bin/env python3
"""Keeps the trained tensors of a run, to go on elsewhere: `python recipes/nano/keep_checkpoint.py DATA/run/model`.

Encoder and embeddings are Whisper's and come from build_model.py again; the rest is written in float16 to
checkpoint.safetensors beside this file. `train_model.py --weights recipes/nano/checkpoint.safetensors` lays it over the
model that build_model.py made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nano_model.training.checkpoint import CHECKPOINT_FILE, keep

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of a trained model")
    parser.add_argument("--target", type=Path, default=Path(__file__).with_name(CHECKPOINT_FILE))
    arguments = parser.parse_args()
    print(f"{keep(arguments.source, arguments.target) / 1e6:.1f} MB in {arguments.target}")
