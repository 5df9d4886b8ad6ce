"""The JSON lines files: which clips, and how many conversations of each kind, for every split."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import human
from .conversations import Maker
from .messages import Clip, check_conversation, read_classes
from .newcomers import KINDS as NEWCOMER_KINDS
from .newcomers import voice_of
from .sounds import KINDS_SPLIT, MADE_SET, RECORDED_SETS
from .speech import WORDS_SET
from .splits import draw
from .store import read_jsonl, read_shards
from .writing import written

# conversations drawn for each split, by kind
DRAWN = {
    "train": {
        "is_speech": 3000,
        "follow_up": 14000,
        "compare": 7000,
        "describe_both": 15000,
        "longer": 2500,
        "count": 2500,
        "options": 6000,
    },
    "valid": {
        "is_speech": 60,
        "follow_up": 100,
        "compare": 120,
        "describe_both": 60,
        "longer": 20,
        "count": 20,
        "options": 60,
    },
    "test": {
        "is_speech": 200,
        "follow_up": 200,
        "compare": 300,
        "describe_both": 200,
        "longer": 60,
        "count": 60,
        "options": 100,
    },
}
ANOTHER = 150  # second questions about a clip of their own, in their test
NEWCOMERS = {"train": 1500, "valid": 6, "test": 25}  # of each kind of newcomers' questions
# Once more in training for each time here: hard, or, to be described, next to questions for a sound in like words.
OFTEN_ASKED = (
    "describe",
    "describe",
    "summarize",
    "first_words",
    "last_words",
    "duration",
    "word",
    "number",
    "name",
)
PASSES = {
    "train": 3,
    "valid": 1,
    "test": 1,
}  # how often each sound or instrument is asked about, freely and by choice
SPEECH_LIKE_OTHERS = {"train": 600, "valid": 15, "test": 40}  # speech clips among the sounds
QUIET_SOUNDS = {"train": 2500, "valid": 60, "test": 150}  # sounds to transcribe: nothing is said
SPEECH_SPLITS = {"train": ("train",), "valid": ("valid",), "test": ("test_sentences", "test_voices")}
SOUNDS = {
    "train": ("sound/train", *(f"{name}/train" for name in RECORDED_SETS), f"{MADE_SET}/train"),
    "valid": ("sound/valid",),
    "test": ("sound/test",),
}  # folders
LONG_S = 9.0  # longer clips have a file of their own: they cost much and are needed less often
SENTENCES_PER_ROW = 8  # of text without audio
EXCLUDED_WORDS = 4  # a training clip that says what a human prompt of so many words says is left out


def clips_of(data_dir: Path, *folder: str) -> list[Clip]:
    """The clips of complete shards below a folder of audio/."""
    root = data_dir.joinpath("audio", *folder)
    rows = read_shards(root, data_dir) if root.exists() else ()
    return [
        Clip(
            row["path"],
            row["duration_s"],
            row.get("label", "speech"),
            row.get("text", ""),
            written(row.get("original", row.get("text", ""))),
            voice_of(row.get("voice")),
        )
        for row in rows
    ]


def speech_clips(data_dir: Path, name: str) -> list[Clip]:
    """Speech of a set by every engine; training leaves out what the human prompts say."""
    clips = clips_of(data_dir, "speech", name)
    if name != "train":
        return clips
    prompts = long_prompts()
    return [clip for clip in clips if not says_any(clip.text, prompts)]


def says_any(text: str, prompts: list[str]) -> bool:
    """Whether a text holds one of the `long_prompts`."""
    return any(prompt in f" {text} " for prompt in prompts)


def long_prompts() -> list[str]:
    """What people say in the evaluation, in several words, between spaces: not to be trained on."""
    return [f" {text} " for text in human.all_transcripts() if len(text.split()) >= EXCLUDED_WORDS]


def sentence_rows(data_dir: Path, maker: Maker) -> Iterator[dict[str, Any]]:
    """All training sentences as text, several a row; the sources mixed."""
    prompts = long_prompts()
    texts = [
        row["text"]
        for row in read_jsonl(data_dir / "text" / "train.jsonl")
        if not says_any(row["text"], prompts)
    ]
    maker.rng.shuffle(texts)
    for start in range(0, len(texts), SENTENCES_PER_ROW):
        yield maker.sentences(texts[start : start + SENTENCES_PER_ROW])


def make_maker(
    data_dir: Path, split: str, timbre: bool = False, sounds: tuple[str, ...] | None = None
) -> Maker:
    """A maker over the clips of a split.

    `timbre`: with the instruments of the held-out sound font. `sounds`: with the sounds of these folders.
    """
    rng = random.Random(f"corpus/{split}{draw()}")
    by_label: dict[str, list[Clip]] = {}
    instruments: dict[str, list[Clip]] = {}
    classes = read_classes()
    for folder in sounds or SOUNDS[split]:
        for clip in clips_of(data_dir, folder):
            label = classes[clip.label]
            by_label.setdefault(label, []).append(dataclasses.replace(clip, label=label))
    for clip in clips_of(data_dir, "instrument", "test_timbre" if timbre else split):
        (by_label if clip.label == "music" else instruments).setdefault(clip.label, []).append(clip)
    spoken = [clip for name in SPEECH_SPLITS[split] for clip in speech_clips(data_dir, name)]
    speech = [clip for clip in spoken if clip.duration_s < LONG_S]
    rng.shuffle(speech)
    if speech:
        by_label["speech"] = speech[: SPEECH_LIKE_OTHERS[split]]
    quiet = clips_of(data_dir, "silence", split)
    asked_about = spoken if split == "train" else speech
    return Maker(split, by_label, instruments, quiet, f"{split}/{timbre}{draw()}", asked_about)


def quiet_rows(maker: Maker, count: int) -> Iterator[dict[str, Any]]:
    """Empty transcripts: silence (twice, for training) and sounds without speech or song."""
    for clip in maker.quiet * (2 if maker.split == "train" else 1):
        yield maker.transcription(clip)
    for _ in range(count):
        clip = maker.sound_clip(but=("speech", "music"))
        yield maker.transcription(Clip(clip.path, clip.duration_s, clip.label))


def about_rows(maker: Maker, kind: str) -> Iterator[dict[str, Any]]:
    """Every sound ("sound", "sound_choice") or instrument clip, asked about `PASSES` times."""
    groups = maker.instruments if kind.startswith("instrument") else maker.by_label
    for _ in range(PASSES[maker.split]):
        for label in sorted(groups):
            for clip in groups[label]:
                row = getattr(maker, kind)(clip)
                yield maker.asked_again(row, clip) if maker.split == "train" else row


def drawn_rows(maker: Maker, kind: str) -> Iterator[dict[str, Any]]:
    """Conversations of a kind over clips drawn at random."""
    make = {"count": maker.count_clips}.get(kind) or getattr(maker, kind)
    for _ in range(DRAWN[maker.split][kind]):
        yield make()


def split_files(data_dir: Path, split: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields (kind, rows) of a split."""
    maker = make_maker(data_dir, split)
    if split != "test":
        speech = speech_clips(data_dir, split)
        for kind, is_long in (("transcription", False), ("transcription_long", True)):
            clips = [clip for clip in speech if (clip.duration_s >= LONG_S) == is_long]
            yield kind, [maker.transcription(clip) for clip in clips]
    if split == "train":
        yield "transcription_words", list(map(maker.transcription, clips_of(data_dir, "speech", WORDS_SET)))
    yield "silence", list(quiet_rows(maker, QUIET_SOUNDS[split]))
    for kind in ("sound", "sound_choice", "instrument", "instrument_choice"):
        yield kind, list(about_rows(maker, kind))
    for kind in DRAWN[split]:
        yield kind, list(drawn_rows(maker, kind))
    kinds = (*NEWCOMER_KINDS, *(OFTEN_ASKED if split == "train" else ()))
    yield "newcomer", [maker.newcomer(kind) for kind in kinds for _ in range(NEWCOMERS[split])]
    yield "text", maker.text_only() * (3 if split == "train" else 1)
    if split == "train":
        yield "sentences", list(sentence_rows(data_dir, maker))


def test_files(data_dir: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields (name, rows) of the tests: speech by what is new in it, prompts, timbre, the other kinds."""
    maker = make_maker(data_dir, "test")
    for name in ("test_sentences", "test_voices", "test_long"):
        clips = [clip for clip in clips_of(data_dir, "speech", name) if "/espeak/" not in clip.path]
        yield name, [maker.transcription(clip) for clip in clips]
    sentences = clips_of(data_dir, "speech", "test_sentences")
    for kind in ("hinted", "remarked"):
        ask = getattr(make_maker(data_dir, "test"), kind)
        yield f"test_{kind}", [ask(clip) for clip in sentences]
    yield "test_another", [maker.another() for _ in range(ANOTHER)]
    robot = clips_of(data_dir, "speech", "test_voices", "espeak")
    yield "test_robot", [maker.transcription(clip) for clip in robot]
    for name in ("human", "read"):
        yield f"test_{name}", [maker.transcription(clip) for clip in clips_of(data_dir, name)]
    for kind, rows in split_files(data_dir, "test"):
        yield f"test_{kind}", rows
    others = tuple(f"{name}/test" for name in RECORDED_SETS)
    for name, folders in (("test_kinds", (f"sound/{KINDS_SPLIT}",)), ("test_more", others)):
        sounds = about_rows(make_maker(data_dir, "test", sounds=folders), "sound")
        yield name, [row for row in sounds if row["label"] not in ("speech", "music")]
    timbre = make_maker(data_dir, "test", timbre=True)
    yield "test_timbre", list(about_rows(timbre, "instrument"))
    yield "test_timbre_choice", list(about_rows(timbre, "instrument_choice"))


def numbered(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ids of their file, each checked."""
    result = [{**row, "id": f"{name}-{number:06d}"} for number, row in enumerate(rows)]
    for row in result:
        check_conversation(row)
    return result
