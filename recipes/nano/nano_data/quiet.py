"""Clips in which nothing happens, and beds of noise and ambience for the trainer to mix under speech."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .splits import draw, made_now, seed_for
from .store import SAMPLING_RATE, make_shard, write_clip

SILENCE_CLIPS = {"train": 240, "valid": 20, "test": 60}
BED_CLASSES = ("applause", "engine", "fire", "noise", "rain", "water", "wind")
BEDS_PER_CLASS = 8
BED_S = 20.0


def silence(rng: Any, duration_s: float) -> Any:
    """Nothing to hear (N,): digital silence, dither, a quiet room, a faint hum or a lone click."""
    import numpy as np

    from .synth import hit, noise, tone

    count = int(duration_s * SAMPLING_RATE)
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros(count, np.float32)
    level = 10 ** (rng.uniform(-85, -45) / 20)
    result = noise(rng, duration_s, rng.uniform(0, 2))[:count] * level
    result = np.pad(result, (0, count - len(result)))
    if kind == 3:
        result += tone(rng.choice([50, 60, 100, 120]), duration_s)[:count] * level * rng.uniform(0.3, 2)
    if kind == 4:
        click = hit(rng, 300, 5000, 0.003) * rng.uniform(0.01, 0.1)
        start = rng.integers(0, max(1, count - len(click)))
        result[start : start + len(click)] += click[: count - start]
    return result.astype(np.float32)


def make_silence(data_dir: Path) -> Iterator[str]:
    """audio/silence/SPLIT: one shard for each split."""
    import numpy as np

    for split in made_now(SILENCE_CLIPS):
        count = SILENCE_CLIPS[split]

        def fill(working: Path, split: str = split, count: int = count) -> list[dict[str, Any]]:
            rows = []
            for number in range(count):
                rng = np.random.default_rng(seed_for("silence", split, number))
                duration_s = float(
                    rng.choice(
                        [rng.uniform(0.3, 3), rng.uniform(3, 12), rng.uniform(12, 29.5)], p=[0.4, 0.4, 0.2]
                    )
                )
                file = f"silence-{split}-{number:04d}.flac"
                written_s = round(write_clip(working / file, silence(rng, duration_s)), 3)
                rows.append(
                    {"id": Path(file).stem, "file": file, "duration_s": written_s, "label": "silence"}
                )
            return rows

        if make_shard(data_dir / "audio" / "silence" / split, fill):
            yield f"silence/{split}"


def make_beds(data_dir: Path) -> Iterator[str]:
    """audio/bed/CLASS: steady sounds of 20 s, from the training families of `events`."""
    import numpy as np

    from .events import FAMILIES

    for label in () if draw() else BED_CLASSES:

        def fill(working: Path, label: str = label) -> list[dict[str, Any]]:
            rows = []
            for number in range(BEDS_PER_CLASS):
                rng = np.random.default_rng(seed_for("bed", label, number))
                families = FAMILIES[label][:-1]
                waveform = np.asarray(families[number % len(families)](rng, BED_S), np.float32)
                waveform *= 0.1 / (np.sqrt(np.mean(waveform**2)) + 1e-9)
                file = f"bed-{label}-{number:02d}.flac"
                write_clip(working / file, waveform)
                rows.append({"id": Path(file).stem, "file": file, "duration_s": BED_S, "label": label})
            return rows

        if make_shard(data_dir / "audio" / "bed" / label, fill):
            yield f"bed/{label}"
