"""This checkout against another one (the commit before a change), in turn, through the public interface only.

    python benchmarks/before_after.py OTHER_CHECKOUT [--cases lone rows folder ...] [--rounds 5] [--json FILE]

Both run in this environment, each in processes of its own with its checkout first on the path, A B A B ...; printed are
medians and the ratio of this checkout to the other. With OMP_NUM_THREADS=1 processor time is measured, which holds on
a busy machine too. Cases with real width need random weights, which the first run
writes below --work-dir (bf16, 4 layers: 3.6 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# A busy machine: one thread, and the processor's time of it alone.
IS_BUSY = os.environ.get("OMP_NUM_THREADS") == "1"
clock = time.process_time if IS_BUSY else time.perf_counter
SPEECH = ROOT / "tests/data/directory_prompt.flac"
SAMPLING_RATE = 16000
NUM_NEW = 64
NUM_CLIPS = 200


def speech(seconds: float) -> Any:
    """The project's recording, repeated to a length."""
    import numpy as np

    from audioflamingo import load_audio

    waveform = load_audio(str(SPEECH))
    return np.tile(waveform, int(seconds * SAMPLING_RATE) // len(waveform) + 1)[
        : int(seconds * SAMPLING_RATE)
    ]


def load(model: str, **options: Any) -> tuple[Any, Any]:
    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

    options = {"dtype": "float32", **options}
    small = os.environ.get("MODEL", "nano")
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(
        small if model == "nano" else model, **options
    ), AutoProcessor.from_pretrained(small)


def nano_batch(processor: Any, *seconds: float) -> Any:
    return processor.apply_transcription_request([speech(s) for s in seconds])


def timed_stream(model: Any, batch: Any, num_new: int = NUM_NEW) -> dict[str, float]:
    """First token and the tokens after it, of all rows together; nothing ends before its length."""
    options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "num_beams": 1, "do_sample": False}
    for _ in range(2):  # the first run warms up
        start = clock()
        steps = model.stream(**batch, **options)
        next(steps)
        first = clock()
        count = sum(1 for _ in steps)
        end = clock()
    return {"first token, s": first - start, "a step, ms": 1000 * (end - first) / count}


def lone() -> dict[str, float]:
    model, processor = load("nano")
    return timed_stream(model, nano_batch(processor, 10))


def rows() -> dict[str, float]:
    model, processor = load("nano")
    return timed_stream(model, nano_batch(processor, 10, 3, 7, 10, 1, 5, 10, 2))


def equal_rows() -> dict[str, float]:
    model, processor = load("nano")
    return timed_stream(model, nano_batch(processor, *[5] * 8))


def beams() -> dict[str, float]:
    model, processor = load("nano")
    batch = nano_batch(processor, 10, 3, 7, 1)
    for _ in range(2):
        start = clock()
        model.generate(**batch, max_new_tokens=NUM_NEW, num_beams=4)
        seconds = clock() - start
    return {"4 prompts, 4 beams, s": seconds}


def second_question() -> dict[str, float]:
    from audioflamingo import Chat

    model, processor = load("nano")
    chat = Chat(model, processor)
    chat.add_audio(speech(20))
    "".join(chat.ask("Transcribe the input speech.", max_new_tokens=32, num_beams=1))
    start = clock()
    next(iter(chat.ask("Is it speech?", max_new_tokens=2, num_beams=1)))
    return {"first token of the second, s": clock() - start}


def wide(scheme: str | None) -> dict[str, float]:
    model, _ = load(os.environ["WIDE"], dtype="bfloat16", quantization=scheme)
    from benchmarks.inference_worker import audio_inputs

    batch = audio_inputs(5, model.config.audio_token_id)
    eight = {"input_ids": batch["input_ids"].repeat(8, 1)}
    for name in ("input_features", "input_features_mask"):
        eight[name] = batch[name].repeat(8, *[1] * (batch[name].dim() - 1))
    one = timed_stream(model, batch, 12)
    together = timed_stream(model, eight, 8)
    return one | {f"8 rows, {name}": value for name, value in together.items()}


def long_recording() -> dict[str, float]:
    from audioflamingo import transcribe

    model, processor = load("nano")
    waveform = speech(600)
    start = clock()
    words = sum(len(segment.text.split()) for segment in transcribe(model, processor, waveform))
    return {"ten minutes, s": clock() - start, "words": words}


def folder() -> dict[str, float]:
    import numpy as np
    import soundfile

    target = Path(os.environ["WORK_DIR"]) / "clips"
    if not (target / "done").exists():
        target.mkdir(parents=True, exist_ok=True)
        lengths = np.random.default_rng(0).lognormal(1.2, 0.8, NUM_CLIPS).clip(0.5, 28)
        for index, seconds in enumerate(lengths):
            soundfile.write(target / f"{index:03}.flac", speech(seconds), SAMPLING_RATE)
        (target / "done").touch()
    command = [sys.executable, "-m", "audioflamingo.cli", "transcribe", str(target), "-f", "txt"]
    command += ["--model", os.environ.get("MODEL", "nano"), "-o"]
    output = Path(os.environ["WORK_DIR"]) / f"out-{os.getpid()}"
    return {"200 clips, s": run_timed([*command, str(output)])}


def imports() -> dict[str, float]:
    program = "from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor"
    return {"import, s": run_timed([sys.executable, "-c", program])}


def command() -> dict[str, float]:
    """From the command line, the built-in model: everything from the start of the process to its end."""
    af3 = [sys.executable, "-m", "audioflamingo.cli"]
    return {
        "import torch, s": run_timed([sys.executable, "-c", "import torch"]),
        "af3 --help, s": run_timed([*af3, "--help"]),
        "af3 transcribe, 11 s clip, s": run_timed([*af3, "transcribe", str(SPEECH)]),
        "af3 ask, 11 s clip, s": run_timed([*af3, "ask", str(SPEECH), "What is said?"]),
    }


FIRST_SCRIPT = """
import sys
from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
model = AudioFlamingo3ForConditionalGeneration.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "text", "text": "Transcribe the input speech."}, {"type": "audio", "path": sys.argv[2]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True
)
outputs = model.generate(**inputs, max_new_tokens=100)
print(processor.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True))
"""


def script() -> dict[str, float]:
    """A newcomer's first script, with nothing chosen, from the start of the process to its end: a clip of 10 s."""
    import soundfile

    clip = Path(os.environ["WORK_DIR"]) / "ten.wav"
    clip.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(clip, speech(10), SAMPLING_RATE)
    program = [sys.executable, "-c", FIRST_SCRIPT, os.environ.get("MODEL", "nano"), str(clip)]
    return {
        "import torch, s": run_timed([sys.executable, "-c", "import torch"]),
        "first script, 10 s clip, s": run_timed(program),
    }


def run_timed(command: list[str]) -> float:
    """Seconds of a whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    return spent if IS_BUSY else time.perf_counter() - start


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "import": imports,
    "command": command,
    "script": script,
    "lone": lone,
    "rows": rows,
    "equal_rows": equal_rows,
    "beams": beams,
    "second_question": second_question,
    "long_recording": long_recording,
    "folder": folder,
    "wide_bf16": lambda: wide(None),
    "wide_int4": lambda: wide("int4"),
}


def worker(case: str) -> None:
    values = CASES[case]()
    usage = resource.getrusage(
        resource.RUSAGE_CHILDREN
        if case in ("folder", "import", "command", "script")
        else resource.RUSAGE_SELF
    )
    print(json.dumps(values | {"peak MB": usage.ru_maxrss / 1000}))


def run(checkout: Path, case: str, work_dir: Path) -> dict[str, float]:
    wide_folder = work_dir / "wide"
    environment = os.environ | {
        "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}",
        "WORK_DIR": str(work_dir),
        "WIDE": str(wide_folder),
    }
    if case.startswith("wide") and not wide_folder.exists():
        command = [sys.executable, str(ROOT / "benchmarks/random_checkpoints.py"), str(wide_folder), "4", "4"]
        subprocess.run(command, check=True, env=environment)
    command = [sys.executable, str(Path(__file__)), "--worker", case]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, cwd=checkout)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", nargs="?", type=Path)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-dir", type=Path, default=Path(".demo/before_after"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", help="a folder for both in place of each one's built-in model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    arguments.work_dir = arguments.work_dir.resolve()
    if arguments.model is not None:
        os.environ["MODEL"] = str(Path(arguments.model).resolve())
    results: dict[str, Any] = {}
    for case in arguments.cases:
        pairs = []
        for _ in range(arguments.rounds):
            pairs.append(
                [run(checkout, case, arguments.work_dir) for checkout in (ROOT, arguments.other.resolve())]
            )
        for name in pairs[0][0]:
            ours, others = ([pair[side][name] for pair in pairs] for side in (0, 1))
            ratio = statistics.median(a / b for a, b in zip(ours, others, strict=True) if b)
            row = {"this": statistics.median(ours), "other": statistics.median(others), "ratio": ratio}
            results[f"{case}: {name}"] = row
            print(
                f"{case + ': ' + name:45} {row['this']:10.4f} {row['other']:10.4f} {ratio:7.2f}", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
