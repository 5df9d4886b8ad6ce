"""Time and memory of loading a checkpoint: this package beside transformers, each in a process of its own.

A synthetic checkpoint with the real widths and a chosen number of layers is written, loaded by both, and
removed. Its content is arbitrary; only sizes count. Files are in the page cache when they are read, so the
times are those of the code, not of the disk. *Anonymous* memory is what the system cannot get back by reading
a file again: weights that are the mapped file cost none. `touched` is the time until every page of the
weights was read too, as the first forward pass does.

    python benchmarks/load.py --layers 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("audioflamingo", "transformers")


def memory_bytes(field: str) -> int:
    """Reads a memory counter of this process (Linux): `RssAnon`, `VmRSS`, `VmHWM` ..."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class PeakMemory(threading.Thread):
    """Samples anonymous memory every millisecond; `stop` returns the highest value above the first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        gc.collect()
        self._first = self._peak = memory_bytes("RssAnon")
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, memory_bytes("RssAnon"))

    def stop(self) -> tuple[int, int]:
        """Returns the peak and the present anonymous memory, in bytes above the start."""
        self._done.set()
        self.join()
        now = memory_bytes("RssAnon")
        return max(self._peak, now) - self._first, now - self._first


def measure(library: str, folder: str, dtype: str) -> dict[str, Any]:
    """Loads the folder once in this process."""
    import torch

    if library == "transformers":
        from transformers import AudioFlamingo3ForConditionalGeneration as Theirs
        from transformers.utils import logging

        logging.disable_progress_bar()
        load: Any = Theirs.from_pretrained
    else:
        from audioflamingo.model import AudioFlamingo3ForConditionalGeneration

        load = AudioFlamingo3ForConditionalGeneration.from_pretrained
    peak = PeakMemory()
    peak.start()
    start = time.perf_counter()
    model = load(folder, dtype=getattr(torch, dtype))
    load_s = time.perf_counter() - start
    peak_bytes, kept_bytes = peak.stop()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::1024].float().sum().item()  # one element of each page
    return {
        "library": library,
        "load_s": load_s,
        "touched_s": time.perf_counter() - start,
        "peak_anonymous_bytes": peak_bytes,
        "kept_anonymous_bytes": kept_bytes,
        "peak_resident_bytes": memory_bytes("VmHWM"),
    }


def write_checkpoint(folder: Path, num_layers: int, dtype: str) -> int:
    """Writes a checkpoint of the published widths, both stacks `num_layers` deep; returns its bytes."""
    import torch

    from audioflamingo.config import AudioFlamingo3Config
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration

    depth = {"num_hidden_layers": num_layers}
    config = AudioFlamingo3Config.from_dict({"audio_config": depth, "text_config": depth})
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run_once(library: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Runs `measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", library, "--folder", str(folder), "--dtype", dtype]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(
    num_layers: int, stored_dtype: str, dtype: str, repeats: int, parent: str | None
) -> dict[str, Any]:
    """Writes the checkpoint, measures both libraries in turn, prints a table, and removes the checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="audioflamingo-load-", dir=parent))
    try:
        writer = [sys.executable, __file__, "--write", str(folder), "--layers", str(num_layers)]
        subprocess.run([*writer, "--stored-dtype", stored_dtype], check=True)
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        runs: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
        for _ in range(repeats):
            for library in LIBRARIES:
                runs[library].append(run_once(library, folder, dtype))
    finally:
        shutil.rmtree(folder)
    print(f"{file_bytes / 1e9:.2f} GB in {stored_dtype}, loaded as {dtype} on the CPU, best of {repeats}")
    columns = ("peak anonymous", "kept anonymous", "peak resident")
    print(f"{'library':<14} {'load':>9} {'touched':>9}", *(f"{column:>15}" for column in columns))
    best = {}
    for library, results in runs.items():
        best[library] = {key: min(r[key] for r in results) for key in results[0] if key != "library"}
        times = (best[library][key] for key in ("load_s", "touched_s"))
        sizes = (best[library][column.replace(" ", "_") + "_bytes"] for column in columns)
        print(f"{library:<14}", *(f"{s:>7.2f} s" for s in times), *(f"{n / 1e9:>12.3f} GB" for n in sizes))
    ours, theirs = (best[library] for library in LIBRARIES)
    ratios = {key: theirs[key] / ours[key] for key in ("load_s", "touched_s")}
    print(f"transformers takes {ratios['load_s']:.1f} x as long, {ratios['touched_s']:.1f} x with touching")
    return {
        "file_bytes": file_bytes,
        "stored_dtype": stored_dtype,
        "dtype": dtype,
        "repeats": repeats,
        "num_cpus": os.cpu_count(),
        **best,
        "ratio": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=2, help="layers of the encoder and of the language model"
    )
    parser.add_argument("--stored-dtype", default="bfloat16")
    parser.add_argument("--dtype", default="bfloat16", help="dtype to load as")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoint is written for the while")
    parser.add_argument("--measure", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        result: Any = measure(arguments.measure, arguments.folder, arguments.dtype)
    elif arguments.write:
        result = write_checkpoint(Path(arguments.write), arguments.layers, arguments.stored_dtype)
    else:
        result = compare(
            arguments.layers, arguments.stored_dtype, arguments.dtype, arguments.repeats, arguments.folder
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
