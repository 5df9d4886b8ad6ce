"""Speech clips: the plan (which sentences, which voice, how long) and the workers that speak it.

The plan depends on the texts and the seeds alone, so that a run that was cut off goes on where it stopped. A
clip of several sentences has natural pauses; no clip is longer than 29.5 s: sentences that do not fit are
left out of both the sound and the transcript.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .splits import seed_for
from .store import SAMPLING_RATE, make_shard, write_clip
from .voices import ENGINES, Voice, one_thread, random_voice

MAX_CLIP_S = 29.5
CHARS_PER_S = 15.0
PAUSE_S, MAX_EDGE_S = (0.15, 0.9), 0.5  # between sentences; before the first and behind the last
QUIET, MARGIN_S = 0.02, 0.02  # of the loudest sample; what engines put around a sentence is cut to this
SHARD_CLIPS = {"kokoro": 20}  # the slow engine: little is lost when it is stopped
USUAL_SHARD_CLIPS = 200
DEFINITION_SHARE = 0.3  # of WordNet's definitions: 100,000 would drown everyday language
KINDS = {
    "single": (0.62, 0, 0),
    "medium": (0.22, 6, 14),
    "long": (0.16, 14, 29),
    "word": (1.0, 0, 0),  # in a set of their own
}  # share, shortest, longest (s)
WORDS_SET = "train_words"


@dataclass(frozen=True)
class SpeechSet:
    """A set of clips to speak: `hours` in all, by one engine, of one split."""

    name: str
    engine: str
    split: str
    hours: float
    held_out_voice: bool = False
    kinds: tuple[str, ...] = ("single", "medium", "long")


@dataclass(frozen=True)
class Clip:
    """One planned clip; `rows` are rows of the text files."""

    clip_id: str
    kind: str
    voice: Voice
    rows: tuple[dict[str, str], ...]


SPEECH_SETS = (
    SpeechSet("train", "hibari", "train", 55),
    SpeechSet("valid", "hibari", "valid", 0.25),
    SpeechSet("test_sentences", "hibari", "test", 0.35, kinds=("single", "medium")),
    SpeechSet("test_long", "hibari", "test", 0.5, kinds=("long",)),
    SpeechSet("train", "piper", "train", 20),
    SpeechSet("valid", "piper", "valid", 0.1),
    SpeechSet("train", "flite", "train", 14),
    SpeechSet("valid", "flite", "valid", 0.1),
    SpeechSet("test_sentences", "flite", "test", 0.15, kinds=("single", "medium")),
    SpeechSet("test_voices", "flite", "test", 0.25, held_out_voice=True, kinds=("single", "medium")),
    SpeechSet("train", "pico", "train", 12),
    SpeechSet("valid", "pico", "valid", 0.1),
    SpeechSet("train", "festival", "train", 3),
    SpeechSet("test_voices", "festival", "test", 0.1, held_out_voice=True, kinds=("single", "medium")),
    SpeechSet("train", "espeak", "train", 2.5),
    SpeechSet(WORDS_SET, "hibari", "train", 2.2, kinds=("word",)),
    SpeechSet(WORDS_SET, "piper", "train", 3.0, kinds=("word",)),
    SpeechSet(WORDS_SET, "pico", "train", 1.2, kinds=("word",)),
    SpeechSet(WORDS_SET, "flite", "train", 0.7, kinds=("word",)),
    SpeechSet(WORDS_SET, "festival", "train", 0.25, kinds=("word",)),
    SpeechSet("test_voices", "espeak", "test", 0.05, held_out_voice=True, kinds=("single", "medium")),
    SpeechSet("test_voices", "kokoro", "test", 0.12, held_out_voice=True, kinds=("single", "medium")),
    SpeechSet("test_long", "kokoro", "test", 0.08, held_out_voice=True, kinds=("long",)),
    SpeechSet("valid", "kokoro", "valid", 0.04),
    SpeechSet("train", "kokoro", "train", 12),
)


def reading_order(rows: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Novels in blocks of consecutive sentences; the rest mixed, so that no clip repeats one pattern."""
    novel = [row for row in rows if row["source"] == "austen"]
    others = [row for row in rows if row["source"] != "austen"]
    others = [
        row for row in others if row["source"] != "wordnet-definition" or rng.random() < DEFINITION_SHARE
    ]
    rng.shuffle(others)
    blocks = [novel[start : start + 12] for start in range(0, len(novel), 12)]
    blocks += [others[start : start + 12] for start in range(0, len(others), 12)]
    rng.shuffle(blocks)
    return [row for block in blocks for row in block]


def plan_clips(speech_set: SpeechSet, rows: list[dict[str, str]]) -> list[Clip]:
    """The clips of a set. Every sentence is used once before any is used again."""
    seed = seed_for("speech", speech_set.name, speech_set.engine)
    rng = random.Random(seed)
    rows = [row for row in rows if row["split"] == speech_set.split]
    clips: list[Clip] = []
    planned_s = 0.0
    order: Iterator[dict[str, str]] = iter(())
    weights = [KINDS[kind][0] for kind in speech_set.kinds]
    while planned_s < speech_set.hours * 3600:
        kind = rng.choices(speech_set.kinds, weights)[0]
        voice = random_voice(speech_set.engine, rng, speech_set.held_out_voice)
        target_s = rng.uniform(*KINDS[kind][1:])
        chosen: list[dict[str, str]] = []
        clip_s = 0.0
        while not chosen or clip_s < target_s:
            row = next(order, None)
            if row is None:
                order = iter(reading_order(rows, rng))
                continue
            chosen.append(row)
            clip_s += 0.6 + len(row["text"]) / CHARS_PER_S / voice.tempo
        clip_id = f"{speech_set.engine}-{speech_set.name}-{len(clips):06d}"
        clips.append(Clip(clip_id, kind, voice, tuple(chosen)))
        planned_s += min(clip_s, MAX_CLIP_S)
    return clips


def without_quiet_ends(waveform: Any) -> Any:
    """A waveform (N,) from just before its first loud sample to just behind its last."""
    import numpy as np

    loud = np.flatnonzero(np.abs(waveform) > QUIET * np.abs(waveform).max(initial=0.0))
    if not len(loud):
        return waveform
    margin = int(MARGIN_S * SAMPLING_RATE)
    return waveform[max(0, loud[0] - margin) : loud[-1] + margin]


def join_sentences(waveforms: list[Any], rng: random.Random) -> tuple[Any, int]:
    """Joins waveforms (N_i,) with pauses; returns the clip (N,) and how many fitted into `MAX_CLIP_S`.

    Half of the clips begin and end within an eighth of a second, as people cut their recordings.
    """
    import numpy as np

    def silence(seconds: float) -> Any:
        return np.zeros(int(seconds * SAMPLING_RATE), np.float32)

    pieces = [silence(MAX_EDGE_S * rng.random() ** 2)]
    used = 0
    for waveform in map(without_quiet_ends, waveforms):
        so_far = sum(map(len, pieces))
        if used and so_far + len(waveform) > MAX_CLIP_S * SAMPLING_RATE:
            break
        pieces += [waveform, silence(rng.uniform(*PAUSE_S))]
        used += 1
    pieces[-1] = silence(MAX_EDGE_S * rng.random() ** 2)
    return np.concatenate(pieces)[: int(MAX_CLIP_S * SAMPLING_RATE)], used


def set_level(waveform: Any, rng: random.Random) -> Any:
    """Scales to a random level, -30 to -17 dBFS RMS."""
    import numpy as np

    rms = float(np.sqrt(np.mean(np.square(waveform)) + 1e-12))
    return (waveform * (10 ** (rng.uniform(-30, -17) / 20) / rms)).astype(np.float32)


def sentence(text: str) -> str:
    """A sentence that ends: capital first, a full stop where there is none."""
    text = text.strip().rstrip(",;:")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def speak_shard(folder: Path, clips: list[Clip], engine: Any) -> list[dict[str, Any]]:
    """Speaks clips into a folder and returns their index rows. Clips that failed are left out."""
    index = []
    for clip in clips:
        rng = random.Random(seed_for("join", clip.clip_id))
        waveforms = engine.say([sentence(row["original"]) for row in clip.rows], clip.voice)
        if any(len(waveform) < 0.15 * SAMPLING_RATE for waveform in waveforms):
            continue
        waveform, used = join_sentences(waveforms, rng)
        if used == 1 and len(waveforms[0]) > (MAX_CLIP_S - 1) * SAMPLING_RATE:
            continue
        file = f"{clip.clip_id}.flac"
        duration_s = write_clip(folder / file, set_level(waveform, rng))
        index.append(
            {
                "id": clip.clip_id,
                "file": file,
                "duration_s": round(duration_s, 3),
                "kind": clip.kind,
                "voice": asdict(clip.voice),
                "sources": [row["id"] for row in clip.rows[:used]],
                "text": " ".join(row["text"] for row in clip.rows[:used]),
                "original": " ".join(sentence(row["original"]) for row in clip.rows[:used]),
            }
        )
    return index


_engines: dict[str, Any] = {}


def _work(job: tuple[Path, str, list[Clip]]) -> tuple[str, float]:
    folder, engine_name, clips = job
    if engine_name not in _engines:
        _engines[engine_name] = ENGINES[engine_name]()
    seconds: list[float] = []

    def fill(working: Path) -> list[dict[str, Any]]:
        rows = speak_shard(working, clips, _engines[engine_name])
        seconds.extend(row["duration_s"] for row in rows)
        return rows

    make_shard(folder, fill)
    return folder.name, sum(seconds)


def speech_folder(data_dir: Path, speech_set: SpeechSet) -> Path:
    """Folder of a set's shards."""
    return data_dir / "audio" / "speech" / speech_set.name / speech_set.engine


def speak_set(
    speech_set: SpeechSet, rows: list[dict[str, str]], data_dir: Path, workers: int
) -> Iterator[str]:
    """Speaks what is missing of a set and yields a line of progress for each shard."""
    clips = plan_clips(speech_set, rows)
    root = speech_folder(data_dir, speech_set)
    jobs = []
    size = SHARD_CLIPS.get(speech_set.engine, USUAL_SHARD_CLIPS)
    for start in range(0, len(clips), size):
        folder = root / f"{start // size:04d}"
        if not folder.exists():
            jobs.append((folder, speech_set.engine, clips[start : start + size]))
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), initializer=one_thread) as pool:
        for number, (name, seconds) in enumerate(pool.imap_unordered(_work, jobs), 1):
            done = f"{seconds / 60:.1f} min ({number}/{len(jobs)})"
            yield f"{speech_set.name}/{speech_set.engine}/{name}: {done}"
