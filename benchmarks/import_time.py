"""What importing the model and the processor adds to `import torch`, beside transformers.

Each import runs in a fresh interpreter, the packages in turns.

    python benchmarks/import_time.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

PROGRAM = """
import time
import torch
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""
STATEMENTS = {
    "audioflamingo": "from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor",
    "transformers": "from transformers import AudioFlamingo3ForConditionalGeneration, AutoProcessor",
}


def import_seconds(statement: str) -> float:
    """Seconds of a statement in a fresh interpreter that has imported torch."""
    program = PROGRAM.format(statement=statement)
    return float(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats

    for statement in STATEMENTS.values():  # fills the disk cache
        import_seconds(statement)
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats):
        for name, statement in STATEMENTS.items():
            seconds[name].append(import_seconds(statement))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(
            f"{name:>14} {median:6.2f} s on top of torch ({min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        )
    print(json.dumps({"benchmark": "import_time", "seconds": medians}))


if __name__ == "__main__":
    main()
