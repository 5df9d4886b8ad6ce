"""Clips of one instrument, and of small ensembles (class "music"), played by FluidSynth from random scores.

Training uses two sound fonts; `test_timbre` plays a third, whose samples training never heard.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .midi import Note, Program, write_midi
from .splits import made_now, seed_for
from .store import SAMPLING_RATE, make_shard, write_clip

# General MIDI programs (from 0) and the range of keys; drums are channel 9 and have kits instead
INSTRUMENTS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "piano": ((0, 1, 2, 3), 36, 90),
    "organ": ((16, 17, 18, 19), 40, 84),
    "guitar": ((24, 25, 26, 27, 29, 30), 40, 76),
    "violin": ((40, 110), 55, 91),
    "harp": ((46,), 36, 88),
    "trumpet": ((56, 59), 54, 84),
    "saxophone": ((64, 65, 66, 67), 44, 78),
    "clarinet": ((71,), 50, 86),
    "flute": ((73, 72, 74), 60, 94),
    "accordion": ((21, 23), 48, 82),
    "xylophone": ((13, 12), 60, 96),
    "drums": ((0, 8, 16, 25, 40), 35, 57),
}
CHORDAL = {"piano", "organ", "guitar", "harp", "accordion"}
SCALES = (
    (0, 2, 4, 5, 7, 9, 11),
    (0, 2, 3, 5, 7, 8, 10),
    (0, 2, 4, 7, 9),
    (0, 3, 5, 7, 10),
    (0, 2, 3, 5, 7, 9, 10),
)
SOUND_FONTS = {
    "timgm": "/usr/share/sounds/sf2/TimGM6mb.sf2",
    "csound": "usr/share/sounds/sf2/sf_GMbank.sf2",
    "fluid": "usr/share/sounds/sf2/FluidR3_GM.sf2",
}
CLIPS = {  # clips of each instrument, and sound fonts; in this order
    "test": (25, ("timgm", "csound")),
    "test_timbre": (25, ("fluid",)),
    "valid": (10, ("timgm", "csound")),
    "train": (400, ("timgm", "csound")),
}
MUSIC_CLIPS = {"train": 200, "valid": 8, "test": 12, "test_timbre": 20}
GAP_S = 1.5
SHARD_CLIPS = 36


@dataclass(frozen=True)
class Score:
    """What to play for one clip, from time 0."""

    label: str
    program: int
    duration_s: float
    programs: tuple[Program, ...]
    notes: tuple[Note, ...]


def melody(
    rng: random.Random, channel: int, low: int, high: int, duration_s: float, chords: bool
) -> list[Note]:
    """A random walk over a scale with a rhythm that repeats, sometimes in chords."""
    scale, root = rng.choice(SCALES), rng.randint(low, low + 11)
    keys = [
        root + 12 * octave + step
        for octave in range(9)
        for step in scale
        if root + 12 * octave + step <= high
    ]
    beat = rng.uniform(0.16, 0.65)
    rhythm = [beat * rng.choice((0.5, 1, 1, 1, 2, 3)) for _ in range(rng.randint(3, 8))]
    place, now, number, notes = rng.randrange(len(keys)), 0.0, 0, []
    legato = rng.choice((0.4, 0.8, 0.95, 1.1))
    style = rng.choice(("melody", "melody", "chords", "arpeggio")) if chords else "melody"
    while now < duration_s:
        length = rhythm[number % len(rhythm)]
        step = rng.choice((-3, -2, -1, -1, 1, 1, 2, 3, 0)) if style != "arpeggio" else rng.choice((2, 2, -4))
        place = min(len(keys) - 1, max(0, place + step))
        together = (0, 2, 4) if style == "chords" else (0,)
        for above in together:
            if rng.random() > 0.06 and place + above < len(keys):
                velocity = rng.randint(60, 120)
                notes.append(
                    Note(channel, keys[place + above], now, min(length * legato, duration_s - now), velocity)
                )
        now += length
        number += 1
    return notes


def drum_pattern(rng: random.Random, duration_s: float) -> list[Note]:
    """A one-bar groove of kick, snare, cymbals and toms that repeats with fills."""
    step_s = rng.uniform(0.09, 0.2)
    cymbal = rng.choice((42, 42, 46, 51))
    parts = {
        36: rng.uniform(0.2, 0.5),
        38: rng.uniform(0.1, 0.35),
        cymbal: rng.uniform(0.4, 1),
        45: 0.1,
        50: 0.08,
        49: 0.03,
    }
    bar = [(step, key) for step in range(16) for key, chance in parts.items() if rng.random() < chance]
    bar += [(0, 36), (4, 38), (12, 38)]
    notes = []
    for number in range(int(duration_s / step_s / 16) + 1):
        for step, key in bar:
            start = (number * 16 + step) * step_s
            if start < duration_s and rng.random() > 0.05:
                notes.append(Note(9, key, start, 0.2, rng.randint(70, 125)))
    return notes


def solo_score(label: str, rng: random.Random) -> Score:
    """A clip of one instrument."""
    programs, low, high = INSTRUMENTS[label]
    program, duration_s = rng.choice(programs), min(12.0, max(2.0, rng.gammavariate(4, 1.3)))
    channel = 9 if label == "drums" else 0
    if label == "drums":
        notes = drum_pattern(rng, duration_s)
    else:
        middle = rng.randint(low, high - 14)
        notes = melody(rng, 0, middle, min(high, middle + 24), duration_s, label in CHORDAL)
    return Score(label, program, duration_s, (Program(channel, program, 0.0),), tuple(notes))


def music_score(rng: random.Random) -> Score:
    """A clip of three to five instruments, mostly with drums."""
    duration_s = min(14.0, max(3.0, rng.gammavariate(5, 1.4)))
    names = rng.sample([name for name in INSTRUMENTS if name != "drums"], rng.randint(2, 4))
    programs, notes = [Program(9, rng.choice(INSTRUMENTS["drums"][0]), 0.0)], []
    for channel, name in enumerate(names):
        choices, low, high = INSTRUMENTS[name]
        programs.append(Program(channel, rng.choice(choices), 0.0))
        middle = rng.randint(low, high - 14)
        notes += melody(rng, channel, middle, min(high, middle + 20), duration_s, name in CHORDAL)
    programs.append(Program(8, rng.choice((32, 33, 35)), 0.0))
    notes += melody(rng, 8, 28, 48, duration_s, False)
    if rng.random() < 0.85:
        notes += drum_pattern(rng, duration_s)
    return Score("music", -1, duration_s, tuple(programs), tuple(notes))


def render(scores: list[Score], sound_font: Path) -> list[Any]:
    """Plays the scores in one run of FluidSynth; returns a waveform (N,) at 16 kHz for each."""
    import soundfile

    programs, notes, starts, now = [], [], [], 0.3
    for score in scores:
        starts.append(now)
        programs += [Program(item.channel, item.program, now - 0.1) for item in score.programs]
        notes += [Note(n.channel, n.key, n.start_s + now, n.length_s, n.velocity) for n in score.notes]
        now += score.duration_s + GAP_S
    with tempfile.TemporaryDirectory() as folder:
        score_file, sound_file = Path(folder, "score.mid"), Path(folder, "score.wav")
        write_midi(score_file, programs, notes, now)
        command = ["fluidsynth", "-ni", "-q", "-R", "0", "-C", "0", "-r", "32000", "-F", str(sound_file)]
        command += [str(sound_font), str(score_file)]
        subprocess.run(command, check=True, capture_output=True)
        waveform, rate = soundfile.read(sound_file, dtype="float32", always_2d=True)
    from .voices import resample

    mono = resample(waveform.mean(axis=1), rate)
    ends = [start + score.duration_s + 0.5 for start, score in zip(starts, scores, strict=True)]
    spans = zip(starts, ends, strict=True)
    return [mono[int(start * SAMPLING_RATE) : int(end * SAMPLING_RATE)] for start, end in spans]


def font_path(name: str, unpacked: Path) -> Path:
    """Path of a sound font, installed or unpacked."""
    return unpacked / SOUND_FONTS[name]  # an absolute entry stands for itself


def shards(data_dir: Path) -> list[tuple[Path, str, str, list[str]]]:
    """All (folder, split, sound font, labels of the clips)."""
    result = []
    for split in made_now(CLIPS):
        count, fonts = CLIPS[split]
        for font in fonts:
            labels = [label for label in INSTRUMENTS for _ in range(count // len(fonts))]
            labels += ["music"] * (MUSIC_CLIPS[split] // len(fonts))
            random.Random(f"{split}/{font}").shuffle(labels)
            for start in range(0, len(labels), SHARD_CLIPS):
                folder = data_dir / "audio" / "instrument" / split / font / f"{start // SHARD_CLIPS:03d}"
                result.append((folder, split, font, labels[start : start + SHARD_CLIPS]))
    return result


def make_all(data_dir: Path, unpacked: Path) -> Iterator[str]:
    """Makes the missing shards; yields a line for each."""
    for folder, split, font, labels in shards(data_dir):

        def fill(working: Path, folder: Path = folder, font: str = font, labels: list[str] = labels) -> Any:
            return _fill(
                working,
                f"{folder.parent.parent.name}-{font}-{folder.name}",
                font_path(font, unpacked),
                labels,
            )

        if make_shard(folder, fill):
            yield f"instrument/{split}/{font}/{folder.name}"


def _fill(working: Path, name: str, sound_font: Path, labels: list[str]) -> list[dict[str, Any]]:
    import numpy as np

    from .sounds import vary

    rng = random.Random(seed_for("instrument", name))
    scores = [music_score(rng) if label == "music" else solo_score(label, rng) for label in labels]
    noise_rng = np.random.default_rng(seed_for("instrument-room", name))
    rows = []
    for number, (score, waveform) in enumerate(zip(scores, render(scores, sound_font), strict=True)):
        if np.abs(waveform).max() < 1e-3:
            continue  # the sound font has no such program
        file = f"{score.label}-{name}-{number:02d}.flac"
        duration_s = round(write_clip(working / file, vary(waveform, noise_rng)), 3)
        origin = f"{sound_font.name}/{score.program}"
        rows.append(
            {
                "id": Path(file).stem,
                "file": file,
                "duration_s": duration_s,
                "label": score.label,
                "origin": origin,
            }
        )
    return rows
