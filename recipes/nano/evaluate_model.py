#!/usr/bin/env python3
"""Measures a model on all tests of the recipe: `python recipes/nano/evaluate_model.py --data-dir DIR [--model nano]`.

Writes OUTPUT_DIR/TEST.jsonl for each test and OUTPUT_DIR/results.json, and prints a table. Answers are greedy. They
are computed for text tokens only (`nano_model.training.answering`), which gives what the package's `generate` gives;
quantized models are run by the package itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

TESTS = {
    "sentences": "held-out sentences",
    "hinted": "held-out sentences, with a hint",
    "remarked": "held-out sentences, with a remark",
    "voices": "held-out sentences and voices",
    "long": "clips of 14 to 29.5 s",
    "robot": "poor robot voice",
    "human": "human telephone prompts",
    "read": "a novel read by a human",
    "silence": "nothing said",
    "sound": "sounds, freely",
    "sound_choice": "sounds, choice",
    "kinds": "sounds of unheard kinds, freely",
    "more": "sounds recorded for other packages, freely",
    "instrument": "instruments, freely",
    "instrument_choice": "instruments, choice",
    "timbre": "new sound font, freely",
    "timbre_choice": "new sound font, choice",
    "is_speech": "speech or not",
    "follow_up": "second or third turn",
    "another": "second turn with a clip of its own",
    "compare": "which of two clips",
    "describe_both": "both clips named",
    "longer": "which is longer",
    "count": "how many clips",
    "options": "choice, without audio",
    "newcomer": "newcomers' questions, held-out wordings",
    "text": "text questions",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that build_data.py filled")
    parser.add_argument("--model", default="nano", help="folder or id (default: the built-in model)")
    parser.add_argument("--output-dir", type=Path, help="default: DATA_DIR/evaluation")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS), help="only these")
    parser.add_argument("--max-rows", type=int, help="only a fixed random sample of each test")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="measure it quantized")
    return parser.parse_args()


def measure_fast(arguments: argparse.Namespace, name: str, loaded: dict[str, Any]) -> dict[str, Any]:
    """Scores of a test, with text tokens only."""
    from nano_model.training.measures import measure, summary

    file = arguments.data_dir / f"test_{name}.jsonl"
    items = list(measure(loaded["fast"], loaded["processor"], loaded["encoder"], file, arguments.max_rows))
    output = (arguments.output_dir or arguments.data_dir / "evaluation") / f"{name}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in items]
    output.write_text("".join(lines), encoding="utf-8")
    return summary(items)


def measure_quantized(arguments: argparse.Namespace, name: str, loaded: dict[str, Any]) -> dict[str, Any]:
    """Scores of a test through the package."""
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.evaluation import evaluate

    output = (arguments.output_dir or arguments.data_dir / "evaluation") / f"{arguments.quantization}-{name}"
    rows = DatasetConfig(str(arguments.data_dir / f"test_{name}.jsonl"), max_rows=arguments.max_rows)
    result = evaluate(
        loaded["model"], loaded["processor"], rows, output_dir=output, overwrite=True, num_beams=1
    )
    right = [item.is_correct for item in result.items]
    scores: dict[str, Any] = {"items": len(right), "right": sum(right) / len(right)}
    return scores if result.summary.wer is None else scores | {"wer": result.summary.wer}


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model and what its measures need."""
    from nano_model.training.clips import open_cache
    from nano_model.training.forward import FastModel

    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, quantize
    from audioflamingo.training.batches import BatchEncoder

    model: Any = AudioFlamingo3ForConditionalGeneration.from_pretrained(
        arguments.model, dtype=torch.float32
    ).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    if arguments.quantization:
        return {"model": quantize(model, arguments.quantization), "processor": processor}
    encoder = BatchEncoder(processor, None, open_cache(arguments.data_dir, model, processor))
    return {"fast": FastModel(model), "processor": processor, "encoder": encoder}


def measure_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Scores by test."""
    loaded = load(arguments)
    run = measure_quantized if arguments.quantization else measure_fast
    results = {}
    for name in arguments.tests:
        start = time.perf_counter()
        rows = arguments.data_dir / f"test_{name}.jsonl"
        if not rows.exists() or not rows.read_text(encoding="utf-8").strip():
            print(f"[{name}] left out: {rows} is empty, its clips were not made", flush=True)
            continue
        results[name] = {"title": TESTS[name], **run(arguments, name, loaded)}
        print(f"[{name}] {time.perf_counter() - start:.0f} s: {results[name]}", flush=True)
    output_dir = arguments.output_dir or arguments.data_dir / "evaluation"
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The scores as a Markdown table; "right" is the share of answers that match in every word."""
    lines = ["| test | items | word error rate | right |", "|---|---|---|---|"]
    for name, row in results.items():
        wer = f"{row['wer']:.3f}" if "wer" in row and name != "silence" else ""
        lines.append(f"| {row['title']} | {row['items']} | {wer} | {100 * row['right']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure_all(parse_arguments())))
