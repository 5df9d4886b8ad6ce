"""The table at the published depth: 32 encoder and 28 text layers of random weights, one engine in memory at a time.

This package in bfloat16, int8 and int4, transformers in bfloat16, and llama.cpp in Q4_0 (language model only) if
`--llama-python` names an interpreter with `torch` and `llama-cpp-python`. Engines take turns (`--rounds`), each in a
process of its own; every figure is written to the output file as soon as it is known, and a file that is there already
is gone on with. A task that takes longer than `--limit` is left out of that engine, with the reason: a processor
without bfloat16 emulates it, which transformers takes for its matrices. The first call of a task warms up.

The models take 30 GB of disk, and are kept in FOLDER. 20 GB of memory.

    python benchmarks/full_depth.py FOLDER --output full_depth.json
    python benchmarks/full_depth.py FOLDER --output small.json --audio-layers 2 --text-layers 2 --limit 60
"""

from __future__ import annotations

import argparse
import json
import platform
import select
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from inference import Engine, write_models

TASKS = {
    "encode_30": "encoder, 30 s clip",
    "first_token_5": "first token, 5 s clip",
    "first_token": "first token, 30 s clip",
    "prefill": "prefill, 761 tokens",
    "decode": "decode, one token",
    "second_question": "first token of a second question",
}
LLAMA_TASKS = ("prefill", "decode")


class PatientEngine(Engine):
    """A worker process that is given so many seconds for an answer."""

    limit_s = 1e9

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], self.limit_s)[0]:
            self.process.kill()
            self.process.wait()
            raise TimeoutError
        return super()._read()


def engines(folder: Path, llama_python: str | None) -> dict[str, tuple[str, str, Path]]:
    found = {name: (sys.executable, "audioflamingo", folder / name) for name in ("int4", "int8", "bf16")} | {
        "transformers": (sys.executable, "transformers", folder / "bf16")
    }
    if llama_python is not None:
        found["llama.cpp Q4_0"] = (llama_python, "llama.cpp", folder / "q4_0.gguf")
    return found


def run_engine(
    how: tuple[str, str, Path], row: dict[str, Any], tasks: list[str], limit_s: float, save: Any
) -> None:
    """One round of an engine's tasks: each once to warm up, once for the figure. `row` is filled, and saved often."""
    engine = PatientEngine(*how)
    row.setdefault("load_s", []).append(engine.load_s)
    for task in tasks:
        if task in row["left_out"] or (how[1] == "llama.cpp" and task not in LLAMA_TASKS):
            continue
        engine.limit_s = limit_s
        try:
            engine.run(task)
            answer = engine.run(task)
        except TimeoutError:
            row["left_out"][task] = f"took more than {limit_s:.0f} s"
            engine = PatientEngine(*how)
        else:
            row["seconds"].setdefault(task, []).append(answer["seconds"])
            row["peak_gb"] = max(row.get("peak_gb", 0.0), answer["peak_gb"])
            print(f"{row['name']:16} {TASKS[task]:34} {answer['seconds']:.3f} s", flush=True)
        save()
    engine.stop()


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Medians as README shows them."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for task, title in TASKS.items():
        cells = []
        for row in rows.values():
            values = row["seconds"].get(task)
            cells.append(
                row["left_out"].get(task, "") if not values else f"{statistics.median(values):.3g} s"
            )
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    peaks = [f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "" for row in rows.values()]
    return "\n".join([*lines, "| peak memory | " + " | ".join(peaks) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the models are written and kept")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written after each figure")
    parser.add_argument("--audio-layers", type=int, default=32)
    parser.add_argument("--text-layers", type=int, default=28)
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--engines", nargs="+", help="only these: int4, int8, bf16, transformers, llama.cpp")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=2, help="turns of every engine")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that a task may take")
    options = parser.parse_args()
    depths = options.audio_layers, options.text_layers
    options.folder.mkdir(parents=True, exist_ok=True)
    write_models(options.folder, *depths, options.llama_python is not None)
    result: dict[str, Any] = {"layers": depths, "lscpu": _lscpu(), "engines": {}}
    if options.output.exists():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    if tuple(result["layers"]) != depths:
        raise SystemExit(f"{options.output} holds figures of {result['layers']} layers: name another file.")
    if options.llama_python is None:
        result["llama.cpp"] = "left out: no interpreter with llama-cpp-python was named (--llama-python)"
        print(result["llama.cpp"])

    def save() -> None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for _ in range(options.rounds):
        for name, how in engines(options.folder, options.llama_python).items():
            if options.engines is None or name.split()[0] in options.engines:
                row = result["engines"].setdefault(name, {"name": name, "seconds": {}, "left_out": {}})
                run_engine(how, row, options.tasks, options.limit, save)
    save()
    print(table(result["engines"]))
    print(json.dumps(result))


def _lscpu() -> str:
    """What processor this is."""
    if sys.platform != "linux":
        return platform.processor()
    return subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    main()
