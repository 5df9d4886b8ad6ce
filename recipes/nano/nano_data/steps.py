"""The steps of the build. Each makes what is missing and returns a line of summary; any may be stopped."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import corpus, encoder, human, instruments, quiet, sounds, speech, splits, text_sources, words
from .store import INDEX_NAME, read_jsonl, read_shards, sha256_of, write_atomic, write_jsonl

SENTENCES_PER_PATTERN = 160
SINGLE_WORDS = 6000  # rows to say alone


@dataclass(frozen=True)
class Build:
    """What the command line asked for.

    Attributes:
        data_dir: what is made.
        unpacked: where the data packages are unpacked.
    """

    data_dir: Path
    unpacked: Path
    workers: int
    hours_scale: float
    engines: list[str] | None


def text_file(build: Build, split: str) -> Path:
    """The sentences of a split."""
    return build.data_dir / "text" / f"{split}.jsonl"


def make_encoder(build: Build) -> str:
    """encoder.safetensors and whisper/: where the model starts."""
    made = encoder.make_encoder(build.data_dir / "encoder.safetensors", build.data_dir / "whisper")
    return "made" if made else "complete"


def make_text(build: Build) -> str:
    """text/{train,valid,test}.jsonl: distinct sentences, split by a hash of the transcript."""
    if not all(text_file(build, split).exists() for split in splits.SPLITS):
        rows = list(text_sources.text_rows(build.unpacked, SENTENCES_PER_PATTERN))
        for split in splits.SPLITS:
            write_jsonl(text_file(build, split), (row for row in rows if row["split"] == split))
    counts = Counter({split: sum(1 for _ in read_jsonl(text_file(build, split))) for split in splits.SPLITS})
    return ", ".join(f"{count} {split} sentences" for split, count in counts.items())


def make_speech(build: Build) -> str:
    """audio/speech/SET/ENGINE/SHARD: the clips of every speech set, small sets first."""
    texts = {split: list(read_jsonl(text_file(build, split))) for split in splits.SPLITS}
    single = words.word_rows(texts["train"], SINGLE_WORDS)
    made_now = splits.made_now({item.name for item in speech.SPEECH_SETS})
    wanted = [
        item
        for item in speech.SPEECH_SETS
        if item.name in made_now and (build.engines is None or item.engine in build.engines)
    ]
    made = 0
    for item in sorted(wanted, key=lambda one: one.split == "train"):
        if item.split == "train":
            item = dataclasses.replace(item, hours=item.hours * build.hours_scale)
        rows = single if item.name == speech.WORDS_SET else texts[item.split]
        for line in speech.speak_set(item, rows, build.data_dir, build.workers):
            made += 1
            print(f"  {line}", flush=True)
    return f"{made} shards made now"


def make_sounds(build: Build) -> str:
    """audio/sound/SPLIT/CLASS/SHARD: recordings and synthesised events."""
    return _run_shards(sounds.make_all(build.data_dir, build.unpacked))


def make_instruments(build: Build) -> str:
    """audio/instrument/SPLIT/SOUND_FONT/SHARD: one instrument a clip, and ensembles as "music"."""
    return _run_shards(instruments.make_all(build.data_dir, build.unpacked))


def make_quiet(build: Build) -> str:
    """audio/silence/SPLIT and audio/bed/CLASS."""
    silence = _run_shards(quiet.make_silence(build.data_dir))
    return f"silence: {silence}; beds: {_run_shards(quiet.make_beds(build.data_dir))}"


def make_human(build: Build) -> str:
    """audio/human and audio/read: prompts and sentences spoken by people, for evaluation only."""
    made = [make(build.data_dir, build.unpacked) for make in (human.make_human, human.make_read)]
    return "made" if any(made) else "complete"


def _run_shards(lines: Iterable[str]) -> str:
    count = 0
    for line in lines:
        count += 1
        print(f"  {line}", flush=True)
    return f"{count} shards made now"


def make_conversations(build: Build) -> str:
    """train*.jsonl, valid.jsonl and test_*.jsonl over the clips that are complete now; made anew."""
    counts = {} if splits.draw() else _make_training_files(build)
    for name, rows in corpus.test_files(build.data_dir):
        counts[name] = write_jsonl(build.data_dir / f"{name}.jsonl", corpus.numbered(name, rows))
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _make_training_files(build: Build) -> dict[str, int]:
    """Rows by file."""
    counts: dict[str, int] = {}
    everything = []
    for kind, rows in corpus.split_files(build.data_dir, "train"):
        rows = corpus.numbered(f"train_{kind}", rows)
        counts[f"train_{kind}"] = write_jsonl(build.data_dir / f"train_{kind}.jsonl", rows)
        everything += rows
    random.Random("train").shuffle(everything)
    counts["train"] = write_jsonl(build.data_dir / "train.jsonl", everything)
    valid = [
        row
        for kind, rows in corpus.split_files(build.data_dir, "valid")
        for row in corpus.numbered(f"valid_{kind}", rows)
    ]
    counts["valid"] = write_jsonl(build.data_dir / "valid.jsonl", valid)
    return counts


def make_manifest(build: Build) -> str:
    """manifest.json: clips and hours by set, rows and SHA-256 of every JSON lines file."""
    audio: dict[str, dict[str, float]] = {}
    for row in read_shards(build.data_dir / "audio", build.data_dir):
        parts = Path(row["path"]).parts[1:4]
        name = "/".join(
            parts[: 3 if parts[0] == "speech" else 2] if parts[0] not in ("human", "read") else parts[:1]
        )
        entry = audio.setdefault(name, {"clips": 0, "hours": 0.0})
        entry["clips"] += 1
        entry["hours"] += row["duration_s"] / 3600
    for entry in audio.values():
        entry["hours"] = round(entry["hours"], 3)
    files = {}
    for path in sorted([*build.data_dir.glob("*.jsonl"), *build.data_dir.glob("text/*.jsonl")]):
        name = path.relative_to(build.data_dir).as_posix()
        files[name] = {"rows": sum(1 for _ in read_jsonl(path)), "sha256": sha256_of(path)}
    indexes = {
        path.parent.relative_to(build.data_dir).as_posix(): sha256_of(path)
        for path in sorted((build.data_dir / "audio").rglob(INDEX_NAME))
        if not path.parent.name.startswith(".")
    }
    manifest = {"audio": audio, "files": files, "shards": indexes}
    write_atomic(build.data_dir / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    hours = sum(entry["hours"] for entry in audio.values())
    return f"{sum(entry['clips'] for entry in audio.values()):.0f} clips, {hours:.1f} hours"
