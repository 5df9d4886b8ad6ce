"""From nothing to an answer: import, load the built-in model and transcribe ten seconds, beside `import torch` alone.

Each run is a fresh interpreter; the whole process is timed, its start and end included. Run it on an idle machine.

    python benchmarks/first_answer.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = Path(__file__).parents[1] / "tests" / "data" / "directory_prompt.flac"
PROGRAM = f"""
import time
started = time.perf_counter()
from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.audio import load_audio
imported = time.perf_counter()
model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano")
processor = AutoProcessor.from_pretrained("nano")
loaded = time.perf_counter()
clip = load_audio({str(PROMPT)!r})[: 10 * 16000]
inputs = processor.apply_transcription_request(audio=clip).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=100)[:, inputs["input_ids"].shape[1] :]
text = processor.batch_decode(answer, skip_special_tokens=True, strip_prefix=True)[0]
answered = time.perf_counter()
print(imported - started, loaded - imported, answered - loaded, text, sep="|")
"""
PARTS = ("import", "load", "answer", "in all", "process", "import torch alone")


def run(program: str) -> tuple[float, str]:
    """Seconds of a process, and what it prints."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats

    run(PROGRAM)  # fills the disk cache
    rows: list[list[float]] = []
    text = ""
    for _ in range(repeats):
        torch_s, _ = run("import torch")
        process_s, printed = run(PROGRAM)
        *parts, text = printed.strip().split("|")
        seconds = [float(part) for part in parts]
        rows.append([*seconds, sum(seconds), process_s, torch_s])
    medians = {}
    for name, values in zip(PARTS, zip(*rows, strict=True), strict=True):
        medians[name] = statistics.median(values)
        print(f"{name:>18} {medians[name]:5.2f} s ({min(values):.2f} to {max(values):.2f})")
    print(text)
    print(json.dumps({"benchmark": "first_answer", "seconds": medians}))


if __name__ == "__main__":
    main()
