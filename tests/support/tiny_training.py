"""A tiny model folder, a few clips and data files to train on, for tests of training and evaluation."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.tiny_model import tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor

WORDS = ("hello", "world", "the", "capital", "of", "France", "why", "think")


def write_model(folder: Path, **text_changes: Any) -> Path:
    """The tiny model with the tiny processor, in one folder."""
    tiny_model(**text_changes).save_pretrained(folder)
    return write_tiny_processor(folder)


def write_clip(path: Path, duration_s: float, seed: int) -> Path:
    """Noise at 16 kHz as 16-bit WAV."""
    samples = np.random.default_rng(seed).normal(0, 0.1, int(16000 * duration_s)).clip(-1, 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def conversation(name: str, text: str, duration_s: float) -> dict[str, Any]:
    """A transcription row of the clip `name`.wav."""
    path = f"{name}.wav"
    return {
        "id": name,
        "audio": [path],
        "duration_s": duration_s,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Transcribe the input speech."},
                    {"type": "audio", "path": path},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": f'The spoken content of the audio is "{text}".'}],
            },
        ],
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSONL; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_dataset(
    folder: Path, num_rows: int = 12, name: str = "train.jsonl", seed: int = 0, extra_s: float = 0.0
) -> Path:
    """Clips of 0.2 to 0.9 s, and `extra_s` more, with made-up transcripts; every fourth row is text only."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        row_id = f"{name.split('.')[0]}-{number}"
        if number % 4 == 3:
            text = [
                {"role": "user", "content": "What is the capital of France?"},
                {"role": "assistant", "content": "hello"},
            ]
            rows.append({"id": row_id, "audio": [], "duration_s": 0, "messages": text})
            continue
        duration = round(0.2 + 0.7 * rng.random() + extra_s, 3)
        write_clip(folder / f"{row_id}.wav", duration, seed * 1000 + number)
        rows.append(conversation(row_id, " ".join(rng.choice(WORDS, 3)), duration))
    return write_rows(folder / name, rows)


def config_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config of one stage on a tiny model and data set below `folder`, which are made if they are not there."""
    if not (folder / "model").exists():
        write_model(folder / "model", attention_dropout=0.1)
        write_dataset(folder / "data")
        write_dataset(folder / "data", 6, "valid.jsonl", seed=1)
    return {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "data": {
            "train": [{"path": str(folder / "data" / "train.jsonl")}],
            "validation": [{"path": str(folder / "data" / "valid.jsonl")}],
        },
        "stages": [{"learning_rates": {"projector": 1e-2, "language_model": 3e-3}, "max_steps": 6}],
        "batch": {"max_rows": 3, "batches_per_step": 2},
        "validation": {"generate_rows": 2, "max_new_tokens": 4},
        "log_every_steps": 1,
        "tensorboard": False,
        "precision": "float32",
        "device": "cpu",
        **changes,
    }
