#!/usr/bin/env python3
"""Measures a model on all tests of the recipe: `python recipes/nano/evaluate_model.py --data-dir DIR [--model nano]`.

Writes OUTPUT_DIR/TEST/{items.jsonl,summary.json,confusion.png} for each test and OUTPUT_DIR/results.json, and prints a
table. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

TESTS = {
    "sentences": "held-out sentences",
    "voices": "held-out sentences and voices",
    "long": "clips of 14 to 29.5 s",
    "robot": "poor robot voice",
    "human": "human telephone prompts",
    "read": "a novel read by a human",
    "silence": "nothing said",
    "sound": "sounds, freely",
    "sound_choice": "sounds, choice",
    "kinds": "sounds of unheard kinds, freely",
    "instrument": "instruments, freely",
    "instrument_choice": "instruments, choice",
    "timbre": "new sound font, freely",
    "timbre_choice": "new sound font, choice",
    "is_speech": "speech or not",
    "follow_up": "second or third turn",
    "compare": "which of two clips",
    "describe_both": "both clips named",
    "longer": "which is longer",
    "count": "how many clips",
    "options": "choice, without audio",
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
    parser.add_argument("--num-beams", type=int, help="1 is greedy (default: the checkpoint's)")
    parser.add_argument("--overwrite", action="store_true", help="start again")
    return parser.parse_args()


def show_progress(done: int, total: int) -> None:
    """One line that changes."""
    print(f"\r{done}/{total}", end="\n" if done == total else "", flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Scores by test."""
    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, quantize
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.evaluation import evaluate

    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(arguments.model, dtype="float32").eval()
    if arguments.quantization:
        quantize(model, arguments.quantization)
    processor = AutoProcessor.from_pretrained(arguments.model)
    output_dir = arguments.output_dir or arguments.data_dir / "evaluation"
    options = {"num_beams": arguments.num_beams} if arguments.num_beams else {}
    results = {}
    for name in arguments.tests:
        start = time.perf_counter()
        rows = arguments.data_dir / f"test_{name}.jsonl"
        if not rows.read_text(encoding="utf-8").strip():
            print(f"[{name}] left out: {rows} is empty, its clips were not made", flush=True)
            continue
        result = evaluate(
            model,
            processor,
            DatasetConfig(str(rows), max_rows=arguments.max_rows),
            output_dir=output_dir / name,
            overwrite=arguments.overwrite,
            progress=show_progress,
            **options,
        )
        is_right = [item.is_correct for item in result.items]
        results[name] = {"title": TESTS[name], "items": len(is_right), "right": sum(is_right) / len(is_right)}
        if name != "silence" and result.summary.wer is not None:
            results[name]["wer"] = result.summary.wer
        print(f"[{name}] {time.perf_counter() - start:.0f} s", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The scores as a Markdown table; "right" is the share of answers that match in every word."""
    lines = ["| test | items | word error rate | right |", "|---|---|---|---|"]
    for row in results.values():
        wer = f"{row['wer']:.3f}" if "wer" in row else ""
        lines.append(f"| {row['title']} | {row['items']} | {wer} | {100 * row['right']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure(parse_arguments())))
