"""How long do answers take? This package in bfloat16, int8 and int4 beside transformers and llama.cpp, in one run.

Random weights at Audio Flamingo 3's real width, four layers of encoder and language model (`--full`: all 32 and 28,
24 GB of memory, one engine at a time). Every engine is a process of its own; they take turns, so that a noisy machine
disturbs all alike. llama.cpp (language model only, Q4_0) takes part if `--llama-python` names an interpreter that has
`torch` and `llama-cpp-python`; its model is written with the package `gguf`, here.

    python benchmarks/inference.py --output results.json --plot inference.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
TASKS = {
    "encode_5": "encoder, 5 s clip",
    "encode_30": "encoder, 30 s clip",
    "first_token": "first token, 30 s clip",
    "prefill": "prefill, 761 tokens",
    "decode": "decode, one token",
    "decode_batch": "decode, 8 rows",
    "second_question": "first token of a second question",
}
# (task, engine, against whom, its task, at most)
GOALS = (
    ("encode_5", "bf16", "transformers", "encode_5", 0.12),
    ("encode_30", "bf16", "transformers", "encode_30", 0.75),
    ("encode_30", "int8", "transformers", "encode_30", 0.45),
    ("first_token", "bf16", "transformers", "first_token", 0.85),
    ("first_token", "int8", "transformers", "first_token", 0.48),
    ("first_token", "int4", "transformers", "first_token", 0.50),
    ("prefill", "int4", "llama.cpp Q4_0", "prefill", 0.40),
    ("decode", "bf16", "transformers", "decode", 0.55),
    ("decode", "int8", "transformers", "decode", 0.28),
    ("decode", "int4", "transformers", "decode", 0.14),
    ("decode", "int4", "llama.cpp Q4_0", "decode", 0.80),
    ("decode_batch", "int4", "int4", "decode", 1.5),
    ("second_question", "bf16", "transformers", "second_question", 0.03),
)


class Engine:
    """A worker process."""

    def __init__(self, python: str, kind: str, path: Path) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / "inference_worker.py"), kind, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.load_s = self._read()["load_s"]

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r} died; run it by hand to see why.")
        return dict(json.loads(line))

    def run(self, task: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"task": task}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_models(folder: Path, num_audio_layers: int, num_text_layers: int, uses_llama: bool) -> None:
    """The checkpoint, its quantized forms, and a GGUF file; kept if they are there."""

    def write(name: str, *command: str) -> None:
        if not (folder / name).exists():
            subprocess.run([sys.executable, *command], check=True)

    writer, original = str(HERE / "random_checkpoints.py"), str(folder / "bf16")
    write("bf16", writer, original, str(num_text_layers), str(num_audio_layers))
    for scheme in ("int8", "int4"):
        write(
            scheme, "-m", "audioflamingo.cli", "quantize", original, str(folder / scheme), "--scheme", scheme
        )
    if uses_llama:
        write("q4_0.gguf", writer, str(folder / "q4_0.gguf"), str(num_text_layers))


def ceilings() -> dict[str, float]:
    """What the machine can do now: bytes read and operations per second."""
    from audioflamingo import kernels

    buffer = torch.ones(1 << 28, dtype=torch.float32)
    x, weight = torch.randn(761, 3584).bfloat16(), torch.randn(18944, 3584).bfloat16()
    packed = kernels.pack_int8(torch.randint(-127, 128, (18944, 3584), dtype=torch.int8))
    scales = torch.ones(18944)

    def best(call: Any) -> float:
        call()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    operations = 2 * 761 * 3584 * 18944
    return {
        "memory_read_gb_s": buffer.numel() * 4 / best(buffer.sum) / 1e9,
        "bf16_gflop_s": operations / best(lambda: F.linear(x, weight)) / 1e9,
        "int8_gop_s": operations
        / best(lambda: kernels.linear_int8(x, packed, scales, None, (18944, 3584)))
        / 1e9,
    }


def measure(engines: dict[str, Engine], tasks: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds by task and engine; the first round warms up."""
    seconds: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}
    for task in tasks:
        for turn in range(repeats + 1):
            for name, engine in engines.items():
                if not name.startswith("llama") or task in ("prefill", "decode"):
                    value = engine.run(task)["seconds"]
                    if turn:
                        seconds[task].setdefault(name, []).append(value)
        shown = {name: f"{statistics.median(v):.3f} s" for name, v in seconds[task].items()}
        print(f"{TASKS[task]:34}", "  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    return {task: {name: statistics.median(v) for name, v in row.items()} for task, row in seconds.items()}


def compare(seconds: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The ratios that matter, with what they should be at most."""
    rows = []
    for task, engine, other, other_task, at_most in GOALS:
        if engine in seconds.get(task, {}) and other in seconds.get(other_task, {}):
            ratio = seconds[task][engine] / seconds[other_task][other]
            against = other if task == other_task else f"{other}, {TASKS[other_task]}"
            rows.append(
                {
                    "what": TASKS[task],
                    "engine": engine,
                    "against": against,
                    "ratio": ratio,
                    "at_most": at_most,
                }
            )
    return rows


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Bars of the ratios to the peers; shorter is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if not row["against"].startswith(row["engine"])]  # not ours against ours
    labels = [f"{row['what']}, {row['engine']}\nagainst {row['against']}" for row in rows][::-1]
    ratios = [row["ratio"] for row in rows][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    bars = axes.barh(labels, ratios, color="#4c78a8")
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1, color="gray", linestyle="--", linewidth=1)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("time as a share of the peer's (shorter is faster)")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="of encoder and language model")
    parser.add_argument("--full", action="store_true", help="the published depth, one engine at a time")
    parser.add_argument(
        "--folder", type=Path, help="where the models are written and kept (default: removed)"
    )
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--engines", nargs="+", help="only these: transformers, bf16, int8, int4, llama.cpp")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--plot", help="PNG file of the ratios")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        num_audio, num_text = (32, 28) if options.full else (options.layers, options.layers)
        write_models(folder, num_audio, num_text, options.llama_python is not None)
        wanted = {
            "transformers": (sys.executable, "transformers", folder / "bf16"),
            "bf16": (sys.executable, "audioflamingo", folder / "bf16"),
            "int8": (sys.executable, "audioflamingo", folder / "int8"),
            "int4": (sys.executable, "audioflamingo", folder / "int4"),
        }
        if options.llama_python is not None:
            wanted["llama.cpp Q4_0"] = (options.llama_python, "llama.cpp", folder / "q4_0.gguf")
        if options.engines:
            wanted = {name: how for name, how in wanted.items() if name.split()[0] in options.engines}
        result: dict[str, Any] = {
            "layers": [num_audio, num_text],
            "ceilings": ceilings(),
            "load_s": {},
            "peak_gb": {},
        }
        print("ceilings:", ", ".join(f"{name} {value:.0f}" for name, value in result["ceilings"].items()))
        seconds: dict[str, dict[str, float]] = {task: {} for task in options.tasks}
        groups = [{name: how} for name, how in wanted.items()] if options.full else [wanted]
        for group in groups:
            engines = {name: Engine(*how) for name, how in group.items()}
            for task, row in measure(engines, options.tasks, options.repeats).items():
                seconds[task] |= row
            for name, engine in engines.items():
                last = "decode" if name.startswith("llama") else options.tasks[0]
                result["load_s"][name] = engine.load_s
                result["peak_gb"][name] = engine.run(last)["peak_gb"]
                engine.stop()
    result["seconds"], result["ratios"] = seconds, compare(seconds)
    for row in result["ratios"]:
        mark = "" if row["ratio"] <= row["at_most"] else "  above"
        print(
            f"{row['what']:34} {row['engine']:5} / {row['against']:40} {row['ratio']:.3f} (goal {row['at_most']}){mark}"
        )
    if options.plot:
        plot(result["ratios"], options.plot)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
