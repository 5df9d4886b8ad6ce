"""Data sets of conversations: JSONL in the seed page's message format, and NVIDIA's JSON.

Bad rows are reported with file and line. Audio is only checked to be there; whether it decodes shows when it is read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import AudioFlamingoError, DataError
from audioflamingo.processor.conversation import TRANSCRIPTION_PREFIXES, parse_conversations, strip_framing

logger = logging.getLogger(__name__)
_MARKER = re.compile(r"<sound(?:-(\d+))?>\n?")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MAX_REPORTED = 20


@dataclass(frozen=True)
class DataRow:
    """One conversation.

    Attributes:
        id: unique within its file.
        messages: the processor's format; audio parts hold absolute paths under `path`.
        audio: those paths in order.
        duration_s: seconds of audio in all.
        place: file and line, for messages.
        task: what the file says the row is (`transcription`, ...), or None.
        answer_weight: how much each token of its answers counts in the loss.
    """

    id: str
    messages: list[dict[str, Any]]
    audio: tuple[str, ...]
    duration_s: float
    place: str
    task: str | None = None
    answer_weight: float = 1.0

    @property
    def transcript(self) -> str | None:
        """What is said in the clip, where the row has one clip and an answer in the transcription frame."""
        if len(self.audio) != 1:
            return None
        for message in self.messages:
            answer = text_of(message)
            if message["role"] == "assistant" and answer.strip().startswith(TRANSCRIPTION_PREFIXES):
                return strip_framing(answer)
        return None

    @property
    def num_characters(self) -> int:
        """Characters of all text."""
        return sum(len(text_of(message)) for message in self.messages)


@dataclass
class Dataset:
    """Rows of one file, its weight in the mix, and how many were left out."""

    rows: list[DataRow]
    weight: float = 1.0
    num_bad: int = 0
    num_filtered: int = 0


def text_of(message: dict[str, Any]) -> str:
    """All text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def read_dataset(
    config: DatasetConfig,
    on_bad_row: str = "error",
    min_duration_s: float = 0.0,
    max_duration_s: float = float("inf"),
    seed: int = 0,
) -> Dataset:
    """Reads one file of conversations.

    Raises:
        DataError: the file cannot be read, has no usable row, or has a bad row and `on_bad_row` is `error`.
    """
    path = Path(config.path).expanduser()
    folder = Path(config.audio_dir).expanduser() if config.audio_dir else path.parent
    dataset = Dataset([], config.weight)
    seen: set[str] = set()
    for line, value in _entries(path):
        place = f"{path}:{line}"
        try:
            if isinstance(value, ValueError):
                raise DataError(f"not valid JSON ({value})")
            row = _parse_row(value, config, folder, place)
            if row.id in seen:
                raise DataError(f"the id {row.id!r} occurs twice")
            seen.add(row.id)
        except (AudioFlamingoError, KeyError, TypeError, AttributeError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            message = f"{place}: {reason}."
            if on_bad_row == "error":
                raise DataError(f"{message} Repair the row, or set on_bad_row: skip.") from error
            dataset.num_bad += 1
            if dataset.num_bad <= MAX_REPORTED:
                logger.warning("skipped %s", message)
            continue
        if not min_duration_s <= row.duration_s <= max_duration_s:
            dataset.num_filtered += 1
            continue
        dataset.rows.append(row)
    if dataset.num_bad > MAX_REPORTED:
        logger.warning("skipped %d bad rows of %s in all", dataset.num_bad, path)
    if not dataset.rows:
        raise DataError(
            f"{path} has no usable row ({dataset.num_bad} bad, {dataset.num_filtered} too short or long)."
        )
    if config.max_rows is not None and config.max_rows < len(dataset.rows):
        chosen = np.random.default_rng([seed, 7]).permutation(len(dataset.rows))[: config.max_rows]
        dataset.rows = [dataset.rows[i] for i in sorted(chosen.tolist())]
    return dataset


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) of JSONL, or (item, value) of one JSON list; a line that does not parse yields the error."""
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "[":
                try:
                    yield from enumerate(json.load(file), start=1)
                except ValueError as error:
                    raise DataError(f"{path} is not valid JSON: {error}.") from error
                return
            for line, text in enumerate(file, start=1):
                if text.strip():
                    try:
                        yield line, json.loads(text)
                    except ValueError as error:
                        yield line, error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error


def _parse_row(value: Any, config: DatasetConfig, folder: Path, place: str) -> DataRow:
    if not isinstance(value, dict):
        raise DataError(f"a row is a JSON object, this is a {type(value).__name__}")
    is_nvidia = config.format == "nvidia" or (config.format == "auto" and "conversations" in value)
    messages = _nvidia_messages(value) if is_nvidia else value["messages"]
    messages, audio = _resolve_audio(messages, folder)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("there is no answer (assistant message) to learn")
    duration = value.get("duration", value.get("duration_s")) if audio else 0.0
    if isinstance(duration, list):
        duration = sum(duration)
    duration = sum(map(_probe_duration, audio)) if duration is None else float(duration)
    return DataRow(
        str(value["id"]), messages, tuple(audio), duration, place, value.get("task"), config.answer_weight
    )


def _resolve_audio(messages: Any, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Makes audio paths absolute and checks that the files are there."""
    parse_conversations(messages)
    audio: list[str] = []
    resolved = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "audio":
                    if "path" not in part:
                        raise DataError("audio parts of a data set need a 'path'")
                    path = folder / part["path"]
                    if not path.is_file():
                        raise DataError(f"there is no audio file {str(path)!r}")
                    audio.append(str(path))
                    part = {**part, "path": str(path)}
                parts.append(part)
            content = parts
        resolved.append({"role": message["role"], "content": content})
    return resolved, audio


def _nvidia_messages(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Turns `conversations` into messages: `<sound>` is the next clip, `<sound-2>` the second of the list.

    A row without markers has its clips in front of the first question, as NVIDIA's own loader does.
    """
    sound = value.get("sound")
    clips = [sound] if isinstance(sound, str) else list(sound or [])
    turns = value["conversations"]
    has_markers = any(
        _MARKER.search(turn["value"]) for turn in turns if _SPEAKERS.get(turn["from"]) == "user"
    )
    used: set[int] = set()
    num_plain = 0
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn["from"] not in _SPEAKERS:
            raise DataError(f"the speaker {turn['from']!r} is not one of {', '.join(_SPEAKERS)}")
        role, text = _SPEAKERS[turn["from"]], turn["value"]
        if role != "user":
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
            continue
        parts: list[dict[str, Any]] = []
        if not has_markers and not any(message["role"] == "user" for message in messages):
            parts += [{"type": "audio", "path": clip} for clip in clips]
            used.update(range(len(clips)))
        end = 0
        for match in _MARKER.finditer(text):
            parts.append({"type": "text", "text": text[end : match.start()]})
            end = match.end()
            index = int(match[1]) - 1 if match[1] else num_plain
            num_plain += not match[1]
            if not 0 <= index < len(clips):
                raise DataError(
                    f"{match[0].strip()} is number {index + 1}, but the row has {len(clips)} clip(s)"
                )
            used.add(index)
            parts.append({"type": "audio", "path": clips[index]})
        parts.append({"type": "text", "text": text[end:].rstrip("\n") if end else text})
        messages.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
    if len(used) != len(clips):
        raise DataError(f"{len(clips)} clips, of which only {len(used)} are named by a <sound> marker")
    return messages


def _probe_duration(path: str) -> float:
    """Seconds of an audio file, from its header."""
    import av

    try:
        with av.open(path) as container:
            if container.duration:
                return float(container.duration) / 1_000_000
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be opened as audio: {error}") from error
    return len(load_audio(path)) / SAMPLING_RATE
