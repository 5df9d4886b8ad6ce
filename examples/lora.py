"""Trains an adapter on a few rows and asks with it: `python examples/lora.py rows.jsonl out/`.

A row is a conversation about a clip; `af3 train` with a file (recipes/lora.yaml) does the same with more to set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from audioflamingo import AudioFlamingo3ForConditionalGeneration
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.training import TrainingConfig, train
from audioflamingo.training.training_config import DataConfig, LoraSettings, StageConfig

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    rows, output_dir = sys.argv[1:]
    train(
        TrainingConfig(
            model=MODEL,
            output_dir=output_dir,
            data=DataConfig(train=[DatasetConfig(rows)]),
            stages=[StageConfig(name="lora", learning_rates={"lora": 1e-3}, max_steps=4)],
            lora=LoraSettings(rank=4, alpha=8),
            tensorboard=False,
        )
    )
    adapter = Path(output_dir, "last", "adapter")
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL)
    model.load_adapter(adapter, "mine")
    print(f"{adapter} is trained; generate(..., adapter='mine') uses it")
