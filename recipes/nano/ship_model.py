#!/usr/bin/env python3
"""Puts a trained model into the package: `python recipes/nano/ship_model.py DATA/run/model`.

Of several checkpoints of one training (`DATA/run/model DATA/more/model`) it takes the mean of their weights. The
model's card (README.md of the target) is written by hand and stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.hub import BUILT_IN_FOLDER
from audioflamingo.quantization.quantize_model import FLOAT_KEY

LARGEST_BYTES = 64_000_000
NUM_BEAMS = 1  # more help little
FLOAT_MODULES = [  # what marks and codes of positions, far larger than what shares their scale, would spoil
    "model.language_model.layers.0.",
    *(f"model.language_model.layers.{layer}.mlp" for layer in range(1, 9)),
    "lm_head",
]


def load_mean(sources: Sequence[Path]) -> AudioFlamingo3ForConditionalGeneration:
    """Loads the models, which checks them, and returns the first with the mean of all weights, in float32."""
    mean = AudioFlamingo3ForConditionalGeneration.from_pretrained(sources[0], dtype=torch.float32)
    for number, source in enumerate(sources[1:], start=2):
        other = AudioFlamingo3ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            for tensor, added in zip(mean.parameters(), other.parameters(), strict=True):
                tensor.lerp_(added, 1 / number)
    return mean


def ship(sources: Sequence[Path], target: Path) -> int:
    """Writes the mean of some models in float16; returns its bytes."""
    model = load_mean(sources).half()
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if num_bytes > LARGEST_BYTES:
        raise SystemExit(
            f"{sources[0]} has {num_bytes / 1e6:.1f} MB of weights, more than {LARGEST_BYTES / 1e6} MB."
        )
    model.generation_config.num_beams = NUM_BEAMS
    model.config.extra[FLOAT_KEY] = FLOAT_MODULES
    model.save_pretrained(target)
    AutoProcessor.from_pretrained(sources[0]).save_pretrained(target)
    return sum(path.stat().st_size for path in target.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="source", help="folder of a trained model")
    parser.add_argument("--target", type=Path, default=BUILT_IN_FOLDER)
    arguments = parser.parse_args()
    print(f"{ship(arguments.sources, arguments.target) / 1e6:.1f} MB in {arguments.target}")
