"""Are words timed where they are said? Sentences that Festival speaks, which knows the time of each word.

Needs Debian's `festival` with `festvox-kallpc16k` (or another voice, `--voice`). Words that are heard right count.

    python benchmarks/word_times.py DATA/test_sentences.jsonl --model nano --sentences 40
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor
from audioflamingo.evaluation import normalize
from audioflamingo.transcription import TranscriptionOptions, transcribe

SPEAK = """
({voice})
(set! utt (SynthText {text}))
(utt.save.wave utt "{path}" 'riff)
(mapcar
 (lambda (w) (format t "WORD %s %f %f\\n" (item.name w) (item.feat w "word_start") (item.feat w "word_end")))
 (utt.relation.items utt 'Word))
"""


def speak(text: str, path: Path, voice: str) -> list[tuple[str, float, float]]:
    """Speaks a sentence into a file; returns its words with their starts and ends."""
    script = path.with_suffix(".scm")
    script.write_text(SPEAK.format(voice=voice, text=json.dumps(text), path=path))
    found = subprocess.run(["festival", "-b", script], capture_output=True, text=True, check=True).stdout
    words = [line.split()[1:] for line in found.splitlines() if line.startswith("WORD ")]
    return [(name, float(start), float(end)) for name, start, end in words]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSONL with texts")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--sentences", type=int, default=40)
    parser.add_argument("--voice", default="voice_kal_diphone")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    texts = [row["text"] for row in random.Random(0).sample(rows, options.sentences)]
    model = AutoModelForConditionalGeneration.from_pretrained(options.model, dtype="float32")
    processor = AutoProcessor.from_pretrained(options.model)
    how = TranscriptionOptions(num_beams=1, word_timestamps=True)
    starts, ends, shares, num_words = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            path = Path(folder) / f"{number}.wav"
            true = speak(text, path, options.voice)
            segments = list(transcribe(model, processor, str(path), options=how))
            words = [word for segment in segments for word in segment.words or ()]
            num_words += len(true)
            shares += [segment.words_certainty for segment in segments if segment.words_certainty is not None]
            heard, said = [normalize(w.text) for w in words], [normalize(name) for name, _, _ in true]
            for i, j, size in difflib.SequenceMatcher(
                None, heard, said, autojunk=False
            ).get_matching_blocks():
                for word, (_, start, end) in zip(words[i : i + size], true[j : j + size], strict=True):
                    starts.append(word.start_s - start)
                    ends.append(word.end_s - end)
    errors = {"start": np.array(starts), "end": np.array(ends)}
    result = {
        "benchmark": "word_times",
        "model": options.model,
        "voice": options.voice,
        "sentences": len(texts),
        "words": num_words,
        "words_heard": len(starts),
        "certainty": round(float(np.mean(shares)), 3),
        **{
            f"{name}_{what}_ms": round(1000 * float(value))
            for name, error in errors.items()
            for what, value in (
                ("median_error", np.median(abs(error))),
                ("90_percent_below", np.quantile(abs(error), 0.9)),
                ("median_signed", np.median(error)),
            )
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
