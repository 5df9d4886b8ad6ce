"""A question of a benchmark or data set: what is asked, what is right, and how an answer to it is scored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from audioflamingo.audio.stored import StoredAudio, path_of
from audioflamingo.evaluation.scoring import ItemResult


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in its data set.
        text: as the model reads it, without its audio.
        messages: the conversation up to the answer. Audio parts hold a `path`.
        reference: the right answer; empty where the benchmark keeps it to itself.
        score: scores an answer to it.
        options: letter to text, where it has options.
        groups: what the data say about it: task, difficulty, ...
        place: file and row.
        duration_s: seconds of audio; 0 where they are not known before it is read.
        record: the row as it is published, for submissions.
    """

    id: str
    text: str
    messages: Sequence[dict[str, Any]]
    reference: str
    score: Callable[[Question, str], ItemResult]
    options: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    place: str = ""
    duration_s: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What its item is called in a run."""
        return self.place or self.id

    def clips(self) -> list[str | StoredAudio]:
        """Its audio, in order."""
        parts = [
            part
            for message in self.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "audio"
        ]
        return [part["path"] for part in parts]


def fingerprint_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """Tells data sets apart: digests of what is asked and right, and of the names of the audio files.

    Their contents stand with each item: a broken file that was mended is asked about again.
    """
    asked, audio = hashlib.sha256(), hashlib.sha256()
    for question in questions:
        values = [question.id, question.text, question.reference, question.options, question.groups]
        asked.update(json.dumps(values, sort_keys=True).encode())
        for clip in question.clips():
            path = path_of(clip)
            part = (
                "" if isinstance(clip, str) else f"{clip.cell} {clip.member} {clip.start_s} {clip.duration_s}"
            )
            audio.update(f"{os.path.basename(path)} {part}\n".encode())
    return {
        "num_questions": len(questions),
        "questions_sha256": asked.hexdigest(),
        "audio_names_sha256": audio.hexdigest(),
    }
