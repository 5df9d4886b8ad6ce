"""A question of a benchmark or data set: what is asked, what is right, and how an answer to it is scored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from audioflamingo.evaluation.published import ParquetClip
from audioflamingo.evaluation.scoring import ItemResult


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in its data set.
        text: as the model reads it, without its audio.
        messages: the conversation up to the answer. Audio parts hold a `path`, or a `ParquetClip` under `audio`.
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

    def readable_messages(self) -> list[dict[str, Any]]:
        """The messages with the audio that lies inside other files."""

        def load(part: Any) -> Any:
            is_inside = isinstance(part, dict) and isinstance(part.get("audio"), ParquetClip)
            return {**part, "audio": part["audio"].read()} if is_inside else part

        return [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [load(part) for part in message["content"]]}
            for message in self.messages
        ]

    def clips(self) -> list[str | ParquetClip]:
        """Its audio, in order."""
        parts = [
            part
            for message in self.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "audio"
        ]
        return [part.get("path", part.get("audio")) for part in parts]


def fingerprint_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """Tells data sets apart: digests of what is asked and right, and of the names and sizes of the audio files."""
    asked, audio = hashlib.sha256(), hashlib.sha256()
    for question in questions:
        values = [question.id, question.text, question.reference, question.options, question.groups]
        asked.update(json.dumps(values, sort_keys=True).encode())
        for clip in question.clips():
            path, place = (
                (clip.path, f"{clip.column}:{clip.row}") if isinstance(clip, ParquetClip) else (clip, "")
            )
            audio.update(f"{os.path.basename(path)} {place} {_size(path)}\n".encode())
    return {
        "num_questions": len(questions),
        "questions_sha256": asked.hexdigest(),
        "audio_sha256": audio.hexdigest(),
    }


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1
