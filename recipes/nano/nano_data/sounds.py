"""Clips of sounds: recordings from packages and synthesised events, varied.

Training and tests never share a recording (nor its numbered siblings). The set "sound" has recordings of
`tables/recordings.tsv` and synthesis: "test" has new sounds of the families of synthesis that training has,
"test_kinds" those of one more family a class, which training lacks. The sets of `RECORDED_SETS` have recordings only,
each those of a table of its own, from other packages: so a further table moves no clip of the sets before. `MADE_SET`
has further families of synthesis, for training only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .messages import read_table
from .splits import bucket, made_now, seed_for
from .store import SAMPLING_RATE, make_shard, write_clip

KINDS_SPLIT = "test_kinds"
CLIPS_PER_CLASS = {"test": 40, KINDS_SPLIT: 20, "valid": 15, "train": 500}  # in this order
RECORDED_SETS = {
    "sound_more": "more_recordings.tsv",
    "sound_further": "further_recordings.tsv",
    "sound_zipped": "zipped_recordings.tsv",
}
RECORDED_CLIPS_PER_CLASS = {"test": 20, "train": 250}
MADE_SET = "sound_made"  # synthesis of further families, for training only
MADE_CLIPS_PER_FAMILY = 60
LEFT_OUT = "-"
CLIPS_PER_RECORDING = 15  # at most, in the sets of recordings only
RECORDINGS_OF = {"test": "test", KINDS_SPLIT: "none", "valid": "train", "train": "train"}
SHARD_CLIPS = 50
TEST_SHARE = 0.25
RECORDED_SHARE = 0.55


@dataclass(frozen=True)
class Recording:
    """One recording of a package."""

    label: str
    package: str
    licence: str
    path: str
    is_training: bool = False  # for training only
    heard: str = ""  # the class that is heard, where the name misleads; LEFT_OUT: two at once, or another's

    @property
    def group(self) -> str:
        """Siblings such as footstep.1 and footstep.2 are one group: they go to one split."""
        stem = re.sub(r"[0-9]+", "", Path(self.path).stem.lower()).strip("-_. ")
        return f"{self.package}/{stem}"


Shard = tuple[Path, str, str, range]  # folder, label, split, numbers
MakeClip = Callable[[str, str, int, list[Recording], Path], tuple[Any, str]]


def find_recordings(unpacked: Path, table: str = "recordings.tsv") -> list[Recording]:
    """Recordings of a table that are there; a file named twice has the later class."""
    found: dict[str, Recording] = {}
    for row in read_table(table):
        for path in sorted(unpacked.glob(row["files"])):
            if "_desc" not in path.name and path.is_file():
                name = path.relative_to(unpacked).as_posix()
                found[name] = Recording(
                    row["class"],
                    row["package"],
                    row["licence"],
                    name,
                    is_training=row.get("split") == "train",
                    heard=row.get("heard") or "",
                )
    return list(found.values())


def split_recordings(recordings: list[Recording]) -> dict[str, dict[str, list[Recording]]]:
    """label -> {"train": [...], "test": [...]}; a class of fewer than three groups is for training only.

    Those for training only count as no groups: more of them move nothing between training and tests. Such a sibling
    of what is held out is in neither.
    """
    result: dict[str, dict[str, list[Recording]]] = {}
    for label in sorted({recording.label for recording in recordings}):
        members = [recording for recording in recordings if recording.label == label]
        groups = sorted(
            {recording.group for recording in members if not recording.is_training},
            key=lambda group: bucket("sound:" + group),
        )
        held_out = set(groups[: max(1, round(len(groups) * TEST_SHARE))]) if len(groups) >= 3 else set()
        result[label] = {
            "train": [recording for recording in members if recording.group not in held_out],
            "test": [
                recording
                for recording in members
                if recording.group in held_out and not recording.is_training
            ],
        }
    return result


@functools.lru_cache(maxsize=32)  # a piece of music takes a second to decode
def load_recording(path: Path) -> Any:
    """Reads a recording as mono float32 at 16 kHz, peak 1."""
    import numpy as np

    from .voices import read_resampled

    waveform = read_resampled(path)
    loud = np.flatnonzero(np.abs(waveform) > 0.01 * np.abs(waveform).max())
    waveform = waveform[loud[0] : loud[-1] + 1] if len(loud) else waveform
    return waveform / (np.abs(waveform).max() + 1e-9)


def fit(waveform: Any, duration_s: float, rng: Any) -> Any:
    """Makes a recording as long as wanted: cuts a long one, repeats a short one with gaps."""
    import numpy as np

    wanted = int(duration_s * SAMPLING_RATE)
    if len(waveform) > wanted:
        start = rng.integers(0, len(waveform) - wanted + 1)
        return waveform[start : start + wanted]
    result = np.zeros(wanted, np.float32)
    position = int(rng.uniform(0, 0.2) * (wanted - len(waveform)))
    while position < wanted:
        piece = waveform[: wanted - position] * rng.uniform(0.7, 1)
        result[position : position + len(piece)] += piece
        position += len(waveform) + int(rng.uniform(0.02, 0.8) * SAMPLING_RATE)
    return result


def vary(waveform: Any, rng: Any) -> Any:
    """Random colour, room, background and level; the clip starts and ends softly."""
    import numpy as np

    from .synth import noise

    count = len(waveform)
    spectrum = np.fft.rfft(waveform)
    frequency = np.fft.rfftfreq(count, 1 / SAMPLING_RATE)
    spectrum *= (np.maximum(frequency, 50) / 1000) ** rng.uniform(-0.35, 0.35)
    coloured = np.fft.irfft(spectrum, count)
    if rng.random() < 0.35:
        tail_s = rng.uniform(0.1, 0.6)
        tail = rng.standard_normal(int(tail_s * SAMPLING_RATE))
        tail *= np.exp(-np.arange(len(tail)) / SAMPLING_RATE / tail_s * 5) * rng.uniform(0.02, 0.1)
        tail[0] = 1
        size = count + len(tail)
        coloured = np.fft.irfft(np.fft.rfft(coloured, size) * np.fft.rfft(tail, size), size)[:count]
    coloured /= np.sqrt(np.mean(coloured**2)) + 1e-9
    if rng.random() < 0.5:
        background = noise(rng, count / SAMPLING_RATE, rng.uniform(0, 1.5))[:count]
        coloured[: len(background)] += background * 10 ** (-rng.uniform(18, 45) / 20)
    edge = min(count // 4, 160)
    coloured[:edge] *= np.linspace(0, 1, edge)
    coloured[-edge:] *= np.linspace(1, 0, edge)
    return (coloured * 10 ** (rng.uniform(-32, -16) / 20)).astype(np.float32)


def make_clip(
    label: str, split: str, number: int, recordings: list[Recording], unpacked: Path
) -> tuple[Any, str]:
    """One clip (N,) of a class, and where it comes from: a recording's path or "synthesis/FAMILY"."""
    import numpy as np

    from .events import FAMILIES

    rng = np.random.default_rng(seed_for("sound", label, split, number))
    duration_s = draw_duration(rng)
    families = FAMILIES.get(label, ())
    families = families[-1:] if split == KINDS_SPLIT else families[:-1]
    if recordings and (not families or rng.random() < RECORDED_SHARE):
        return play(recordings, duration_s, rng, unpacked)
    return synthesise(families[rng.integers(len(families))], duration_s, rng)


def make_recorded_clip(
    name: str, label: str, split: str, number: int, recordings: list[Recording], unpacked: Path
) -> tuple[Any, str]:
    """One clip (N,) of a set of recordings only, and the recording's path."""
    import numpy as np

    rng = np.random.default_rng(seed_for(name, label, split, number))
    return play(recordings, draw_duration(rng), rng, unpacked)


def make_further_clip(
    label: str, split: str, number: int, recordings: list[Recording], unpacked: Path
) -> tuple[Any, str]:
    """One clip (N,) of a class's further families, and which."""
    import numpy as np

    from .events_further import FAMILIES

    rng = np.random.default_rng(seed_for(MADE_SET, label, split, number))
    return synthesise(FAMILIES[label][number % len(FAMILIES[label])], draw_duration(rng), rng)


def synthesise(family: Any, duration_s: float, rng: Any) -> tuple[Any, str]:
    """A clip (N,) of a family, varied; and its name."""
    import numpy as np

    return vary(np.asarray(family(rng, duration_s), np.float64), rng), f"synthesis/{family.__name__}"


def draw_duration(rng: Any) -> float:
    """Seconds of a clip."""
    return float(min(max(rng.gamma(4, 1.1), 1.2), 12))


def play(recordings: list[Recording], duration_s: float, rng: Any, unpacked: Path) -> tuple[Any, str]:
    """One of the recordings, a little faster or slower, as long as wanted and varied (N,); and its path."""
    import soxr

    recording = recordings[rng.integers(len(recordings))]
    waveform = load_recording(unpacked / recording.path)
    waveform = soxr.resample(waveform, SAMPLING_RATE * rng.uniform(0.85, 1.18), SAMPLING_RATE)
    return vary(fit(waveform, duration_s, rng), rng), recording.path


def sound_labels() -> list[str]:
    """The classes of this module; speech and instruments are made elsewhere."""
    from .events import FAMILIES

    return sorted([*FAMILIES, "music"])


def cut(root: Path, label: str, split: str, size: int) -> Iterator[Shard]:
    """The shards of so many clips of a class."""
    for start in range(0, size, SHARD_CLIPS):
        folder = root / split / label / f"{start // SHARD_CLIPS:03d}"
        yield folder, label, split, range(start, min(size, start + SHARD_CLIPS))


def shards(data_dir: Path) -> list[Shard]:
    """All (folder, label, split, numbers), class by class in turn; music's synthesis is in `instruments`."""
    result: list[Shard] = []
    for split in made_now(CLIPS_PER_CLASS):
        count = CLIPS_PER_CLASS[split]
        for label in sound_labels():
            if split == KINDS_SPLIT and label == "music":
                continue
            size = count // 2 if label == "music" else count
            result += cut(data_dir / "audio" / "sound", label, split, size)
    return sorted(result, key=lambda shard: (list(CLIPS_PER_CLASS).index(shard[2]), shard[0].name))


def recorded_shards(
    data_dir: Path, name: str, recordings: dict[str, dict[str, list[Recording]]]
) -> list[Shard]:
    """The same for a set of recordings only, where a class has as many clips as its recordings bear."""
    result: list[Shard] = []
    for split in made_now(RECORDED_CLIPS_PER_CLASS):
        for label, chosen in recordings.items():
            size = min(RECORDED_CLIPS_PER_CLASS[split], CLIPS_PER_RECORDING * len(chosen[split]))
            result += cut(data_dir / "audio" / name, label, split, size)
    return result


def further_shards(data_dir: Path) -> list[Shard]:
    """The same for `MADE_SET`."""
    from .events_further import FAMILIES

    result: list[Shard] = []
    for split in made_now(("train",)):
        for label, families in FAMILIES.items():
            result += cut(data_dir / "audio" / MADE_SET, label, split, MADE_CLIPS_PER_FAMILY * len(families))
    return result


def jobs(data_dir: Path, unpacked: Path) -> Iterator[tuple[str, MakeClip, Shard, list[Recording]]]:
    """All shards of all sets: (set, what makes a clip, shard, recordings to choose from)."""
    recordings = split_recordings(find_recordings(unpacked))
    for shard in shards(data_dir):
        _, label, split, _ = shard
        yield "sound", make_clip, shard, recordings.get(label, {}).get(RECORDINGS_OF[split], [])
    for name, table in RECORDED_SETS.items():
        recordings = split_recordings(find_recordings(unpacked, table))
        make = functools.partial(make_recorded_clip, name)
        for shard in recorded_shards(data_dir, name, recordings):
            _, label, split, _ = shard
            yield name, make, shard, recordings[label][split]
    for shard in further_shards(data_dir):
        yield MADE_SET, make_further_clip, shard, []


def make_all(data_dir: Path, unpacked: Path) -> Iterator[str]:
    """Makes the missing shards; yields a line for each."""
    for name, make, (folder, label, split, numbers), recordings in jobs(data_dir, unpacked):
        if make_one(folder, make, label, split, numbers, recordings, unpacked):
            yield f"{name}/{split}/{label}/{folder.name}"


def make_one(
    folder: Path,
    make: MakeClip,
    label: str,
    split: str,
    numbers: range,
    recordings: list[Recording],
    unpacked: Path,
) -> bool:
    """Makes a shard if it is missing; whether it was.

    A clip of a recording whose name misleads has the class that is heard, or is left out.
    """
    heard = {recording.path: recording.heard for recording in recordings if recording.heard}

    def fill(working: Path) -> list[dict[str, Any]]:
        rows = []
        for number in numbers:
            waveform, origin = make(label, split, number, recordings, unpacked)
            if heard.get(origin) == LEFT_OUT:
                continue
            file = f"{label}-{split}-{number:05d}.flac"
            duration_s = round(write_clip(working / file, waveform), 3)
            rows.append(
                {
                    "id": Path(file).stem,
                    "file": file,
                    "duration_s": duration_s,
                    "label": heard.get(origin, label),
                    "origin": origin,
                }
            )
        return rows

    return make_shard(folder, fill)
