"""The benchmark for a GPU runs, on the CPU and with a model of nothing: no minute of a lent GPU is to be lost to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
WITHOUT = ("av", "soxr", "silero_vad", "rich", "typer", "jinja2", "huggingface_hub", "accelerate", "peft")
REFUSING = f"""
import importlib.abc, runpy, sys
class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT}:
            raise ImportError(name)
sys.meta_path.insert(0, Refusing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_with_few_packages_and_says_everything(tmp_path: Path) -> None:
    """Every part about this package, its checks included; what a GPU machine may lack is not there."""
    output = tmp_path / "results.json"
    script = [
        ROOT / "benchmarks" / "gpu.py",
        "--tiny",
        "--only",
        "bf16",
        "int4",
        "fp8",
        "load",
        "--output",
        output,
    ]
    result = subprocess.run(
        [sys.executable, "-c", REFUSING, *script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    rows = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(output.read_text()) == rows
    names = {row["name"] for row in rows}
    assert names >= {
        "card",
        "check rows = alone",
        "check captured = eager bf16",
        "check int4 = dequantized",
        "decode bf16 1",
        "decode bf16 eager 1",
        "decode int4 2",
        "check fp8 = dequantized",
        "decode fp8 1",
        "first token 5",
        "encoder 31",
        "second question",
        "server 3 clients",
        "load",
        "peak memory bf16",
    }
    assert all(row["right"] for row in rows if row["name"].startswith("check"))


def test_a_run_without_time_ends_with_what_it_has(tmp_path: Path) -> None:
    """Within the time that it was given, its last line whole."""
    script = [
        ROOT / "benchmarks" / "gpu.py",
        "--tiny",
        "--seconds",
        "0",
        "--output",
        tmp_path / "results.json",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *script], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 1
    rows = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert {"failed in time", "something failed"} <= {row["name"] for row in rows}
