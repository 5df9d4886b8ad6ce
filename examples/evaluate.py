"""Scores a model on rows with known answers: `python examples/evaluate.py rows.jsonl`."""

from __future__ import annotations

import os
import sys

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.evaluation import evaluate

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    result = evaluate(model, processor, sys.argv[1], max_new_tokens=100)
    for item in result.items:
        print(f"expected {item.reference!r}\nanswered {item.answer!r}\n")
    for name, value in result.summary.to_dict().items():
        print(f"{name:24} {value}")
