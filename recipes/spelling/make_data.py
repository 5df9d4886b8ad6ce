"""Makes the data of the recipe: spelled names, codes and numbers, read by speech synthesisers that are installed.

    python recipes/spelling/make_data.py FOLDER [--train 600] [--test 80]

Needs `flite` and `espeak-ng` (Debian packages of these names). Training and validation are read by some voices, the
test by others, with names and codes of its own. Writes train.jsonl, valid.jsonl and test.jsonl as NeMo manifests.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import wave
from pathlib import Path

VOICES = {
    "train": [
        "flite:kal",
        "flite:awb",
        "flite:rms",
        "espeak:en-gb",
        "espeak:en-us+f3",
        "espeak:en-gb-scotland",
    ],
    "test": ["flite:slt", "espeak:en-us+m7"],
}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NAMES = {
    "train": "smith jones brown taylor wilson davies evans thomas johnson roberts walker wright robinson thompson "
    "white hughes edwards green hall wood harris lewis martin jackson clarke turner hill scott cooper morris ward "
    "moore king watson baker harrison morgan patel young allen mitchell james anderson phillips lee bell parker",
    "test": "davis bennett cook shaw griffiths kelly price adams webb marshall simpson gray carter murphy rogers "
    "richards hunt foster dixon mason knight palmer holmes rose",
}


def sentence(rng: random.Random, split: str) -> str:
    """A sentence as the built-in model writes such ones (case, commas), which a synthesiser reads well, too."""
    name = rng.choice(NAMES[split].split())
    letters = list(name)
    code = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 3))]
    digits = [rng.choice(DIGITS) for _ in range(rng.randint(3, 6))]
    forms = (
        (f"My name is {name.title()}", letters),
        ("That is spelled", letters),
        ("The code is", code + digits),
        ("Please call", digits),
        ("Flight", code[:2] + digits[:3]),
        ("The number is", digits),
    )
    start, spelled = rng.choice(forms)
    return f"{start}, {', '.join(item.upper() if len(item) == 1 else item for item in spelled)}."


def speak(text: str, voice: str, path: Path) -> float:
    """Writes a WAV; returns its seconds."""
    program, _, name = voice.partition(":")
    if program == "flite":
        command = ["flite", "-voice", name, "-t", text, "-o", str(path)]
    else:
        command = ["espeak-ng", "-v", name, "-s", "150", "-w", str(path), text]
    subprocess.run(command, check=True, capture_output=True)
    with wave.open(str(path)) as file:
        return file.getnframes() / file.getframerate()


def make(folder: Path, split: str, num_rows: int, voices: str, rng: random.Random) -> None:
    """Writes clips and the manifest of a split."""
    audio = folder / "audio" / split
    audio.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as manifest:
        for number in range(num_rows):
            voice = VOICES[voices][number % len(VOICES[voices])]
            text = sentence(rng, voices)
            path = audio / f"{number:04}.wav"
            duration = speak(text, voice, path)
            row = {
                "id": f"{split}-{number}",
                "audio_filepath": str(path.relative_to(folder)),
                "duration": round(duration, 3),
                "text": text,
                "speaker": voice,
            }
            manifest.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=80)
    options = parser.parse_args()
    rng = random.Random(0)
    make(options.folder, "train", options.train, "train", rng)
    make(options.folder, "valid", max(6, options.train // 15), "train", rng)
    make(options.folder, "test", options.test, "test", rng)


if __name__ == "__main__":
    main()
