"""Does it help to hear speech in its context? Word errors and time, for several longest pauses within a window.

Clips of a data file are joined to recordings of some minutes, with pauses of .4 to 2.5 s between them, and transcribed
with `max_pause_ms` of 0 (each stretch of speech alone) and more. Processor time.

    python benchmarks/speech_windows.py DATA/test_voices.jsonl --model nano --minutes 3
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np

from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor
from audioflamingo.audio import load_audio
from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.errors import require
from audioflamingo.evaluation import normalize
from audioflamingo.transcription import TranscriptionOptions, VadOptions, transcribe


def join(data: Path, minutes: float, seed: int) -> tuple[np.ndarray, str]:
    """A recording of clips and pauses, and what is said in it."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(seed)
    rng.shuffle(rows)
    parts, texts, length = [], [], 0
    while rows and length < minutes * 60 * SAMPLING_RATE:
        row = rows.pop()
        pause = np.zeros(round(rng.uniform(0.4, 2.5) * SAMPLING_RATE), np.float32)
        parts += [load_audio(str(data.parent / row["audio"][0])), pause]
        texts.append(row["text"])
        length += sum(len(part) for part in parts[-2:])
    waveform = np.concatenate(parts)
    noise = np.random.default_rng(seed).normal(0, 1e-4, len(waveform))
    return waveform + noise.astype(np.float32), " ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSONL with audio and text")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--pauses-ms", type=float, nargs="+", default=[0, 1500, 3000])
    options = parser.parse_args()
    jiwer = require("jiwer", "evaluation")
    model = AutoModelForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(options.model)
    waveform, reference = join(options.data, options.minutes, options.seed)
    results = []
    for pause_ms in options.pauses_ms:
        how = TranscriptionOptions(num_beams=options.num_beams, vad=VadOptions(max_pause_ms=pause_ms))
        start = time.process_time()
        segments = list(transcribe(model, processor, waveform, options=how))
        seconds = time.process_time() - start
        text = normalize(" ".join(segment.text for segment in segments))
        rate = jiwer.wer(normalize(reference), text)
        results.append(
            {
                "max_pause_ms": pause_ms,
                "segments": len(segments),
                "word_error_rate": round(rate, 4),
                "seconds": round(seconds, 1),
            }
        )
        print(
            f"{pause_ms:6.0f} ms: {len(segments):3d} segments, {rate:.3f} of the words wrong, {seconds:.1f} s"
        )
    audio_s = round(len(waveform) / SAMPLING_RATE, 1)
    settings = {
        "data": options.data.name,
        "model": options.model,
        "audio_s": audio_s,
        "beams": options.num_beams,
    }
    print(json.dumps({"benchmark": "speech_windows", **settings, "results": results}))


if __name__ == "__main__":
    main()
