"""The list of benchmarks has them all."""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PARTS = {"inference_worker.py", "random_checkpoints.py"}  # of others


def test_every_benchmark_is_in_the_list() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in BENCHMARKS.glob("*.py")} - PARTS
    assert [name for name in sorted(names) if f"| `{name}` |" not in text] == []
