"""`python -m audioflamingo.evaluation MODEL DATA --output-dir DIR`: evaluates a model on a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from audioflamingo.errors import AudioFlamingoError


def run_evaluation(
    model: str,
    data: str,
    output_dir: str,
    *,
    audio_dir: str | None = None,
    max_rows: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> str:
    """Evaluates a checkpoint on a data file and returns a table of the scores; what the command line calls."""
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.evaluation.evaluate import evaluate
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
    from audioflamingo.processor import AudioFlamingo3Processor

    loaded = AudioFlamingo3ForConditionalGeneration.from_pretrained(model, dtype=dtype, device_map=device)
    result = evaluate(
        loaded,
        AudioFlamingo3Processor.from_pretrained(model),
        DatasetConfig(data, audio_dir=audio_dir, max_rows=max_rows),
        output_dir=output_dir,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        overwrite=overwrite,
        progress=progress,
    )
    lines = [f"{'task':24} {'items':>6} {'WER':>7} {'choice':>7} {'exact':>7}"]
    for name, summary in {**result.by_task, "all": result.summary}.items():
        values = (summary.wer, summary.choice_accuracy, summary.exact_match)
        cells = " ".join(f"{'-' if value is None else format(value, '.4f'):>7}" for value in values)
        lines.append(f"{name:24.24} {summary.num_items:6} {cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, evaluates, prints the scores."""
    parser = argparse.ArgumentParser(prog="python -m audioflamingo.evaluation", description=__doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("data", help="JSONL of conversations, or NVIDIA's JSON")
    parser.add_argument("--output-dir", required=True, help="items.jsonl, summary.json, confusion.png")
    parser.add_argument(
        "--audio-dir", help="what audio paths are relative to (default: the data file's folder)"
    )
    parser.add_argument("--max-rows", type=int, help="evaluate a fixed random sample of so many rows")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", help="dtype of the weights, for example float32")
    parser.add_argument("--device", help="for example cuda; default: cpu")
    parser.add_argument("--overwrite", action="store_true", help="start again")
    options = vars(parser.parse_args(arguments))
    try:
        print(run_evaluation(**options))
    except AudioFlamingoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
