"""Data sets of conversations: rows of any form in any file that is known, checked and in one form.

Bad rows are reported with file and line. Audio is only checked to be there; whether it decodes shows when it is read.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.audio.stored import StoredAudio
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.datasets.row_files import Entry, read_entries
from audioflamingo.datasets.row_forms import AUDIO_COLUMNS, form_of, messages_of
from audioflamingo.errors import AudioFlamingoError, DataError
from audioflamingo.processor.conversation import TRANSCRIPTION_PREFIXES, parse_conversations, strip_framing

logger = logging.getLogger(__name__)
MAX_REPORTED = 20
_NAME_OR_NUMBER = re.compile(r"""(?<!\w)(['"]).*?\1(?!\w)|\S*[/\d]\S*""")
AudioOfRow = str | StoredAudio


@dataclass(frozen=True)
class DataRow:
    """One conversation.

    Attributes:
        id: unique within its data set.
        messages: the processor's format; audio parts hold under `path` what `audio` lists.
        audio: its recordings in order: absolute paths, or parts of files.
        duration_s: seconds of audio in all.
        place: file and line, for messages.
        task: what the file says the row is (`transcription`, ...), or None.
        answer_weight: how much each token of its answers counts in the loss.
    """

    id: str
    messages: list[dict[str, Any]]
    audio: tuple[AudioOfRow, ...]
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


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: where it is, and why. `is_bad` tells faults from rows that were not wanted."""

    place: str
    reason: str
    is_bad: bool


@dataclass
class Dataset:
    """Rows of one data set, its weight in the mix, and what was left out."""

    rows: list[DataRow]
    weight: float = 1.0
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Rows that could not be used."""
        return sum(item.is_bad for item in self.skipped)

    @property
    def num_filtered(self) -> int:
        """Rows that are too short or too long."""
        return len(self.skipped) - self.num_bad


def text_of(message: dict[str, Any]) -> str:
    """All text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def read_dataset(
    config: DatasetConfig,
    on_bad_row: str | None = None,
    min_duration_s: float = 0.0,
    max_duration_s: float = float("inf"),
    seed: int = 0,
) -> Dataset:
    """Reads a data set.

    Args:
        config: which one, and how much of it.
        on_bad_row: `skip` lists bad rows and goes on, `error` stops and names the other choice; None stops.
        min_duration_s: rows with less audio are listed and left out.
        max_duration_s: so are those with more.
        seed: draws the rows where `max_rows` takes only some.

    Raises:
        DataError: it cannot be read, has no usable row, or has a bad row and `on_bad_row` is not `skip`.
        MissingDependencyError: a table, and pyarrow is not installed.
    """
    path = Path(config.path).expanduser()
    dataset = Dataset([], config.weight)
    seen: set[str] = set()
    for entry in read_entries(config):
        place = f"{entry.file}:{entry.place}"
        try:
            row = _parse_row(entry, config, place)
            if row.id in seen:
                raise DataError(f"the id {row.id!r} occurs twice")
            seen.add(row.id)
        except (AudioFlamingoError, KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            if on_bad_row != "skip":
                choice = "leave it out" if on_bad_row is None else "set on_bad_row: skip"
                raise DataError(f"{place}: {reason}. Repair the row, or {choice}.") from error
            dataset.skipped.append(Skipped(place, reason, is_bad=True))
            if dataset.num_bad <= MAX_REPORTED:
                logger.warning("skipped %s: %s.", place, reason)
            continue
        if not min_duration_s <= row.duration_s <= max_duration_s:
            reason = f"{row.duration_s:g} s of audio, not {min_duration_s:g} to {max_duration_s:g} s"
            dataset.skipped.append(Skipped(place, reason, is_bad=False))
            continue
        dataset.rows.append(row)
    if dataset.num_bad > MAX_REPORTED:
        logger.warning("skipped %d bad rows of %s in all", dataset.num_bad, path)
    if not dataset.rows:
        first = (
            f"; the first: {dataset.skipped[0].place}: {dataset.skipped[0].reason}" if dataset.skipped else ""
        )
        raise DataError(
            f"{path} has no usable row ({dataset.num_bad} bad, {dataset.num_filtered} too short or long{first})."
        )
    if config.max_rows is not None and config.max_rows < len(dataset.rows):
        chosen = np.random.default_rng([seed, 7]).permutation(len(dataset.rows))[: config.max_rows]
        dataset.rows = [dataset.rows[i] for i in sorted(chosen.tolist())]
    return dataset


def count_reasons(skipped: Sequence[Skipped]) -> list[tuple[str, int]]:
    """Kinds of reasons and how often each occurs, the most frequent first; a kind has dots for names and numbers."""
    kinds = Counter(_NAME_OR_NUMBER.sub("…", item.reason).rstrip(" …") for item in skipped)
    return kinds.most_common()


def _parse_row(entry: Entry, config: DatasetConfig, place: str) -> DataRow:
    value = entry.value
    if isinstance(value, Exception):
        if not entry.file.suffix.startswith(".json"):
            raise DataError(str(value))
        raise DataError(f"not valid JSON ({value}); in a list of rows each row stands on one line")
    if not isinstance(value, dict):
        raise DataError(f"a row is a JSON object, this is a {type(value).__name__}")
    if "error" in value and isinstance(value["error"], Exception):
        raise DataError(f"its text cannot be read ({value['error']})")
    value = _with_members(value, entry.members)
    form = form_of(value) if config.format == "auto" else config.format
    folder = Path(config.audio_dir).expanduser() if config.audio_dir else entry.file.parent
    messages, audio = _resolve_audio(messages_of(value, form, config.prompt), folder, entry.members)
    duration = value.get("duration", value.get("duration_s")) if audio else 0.0
    duration = (
        float(sum(duration) if isinstance(duration, list) else duration) if duration is not None else None
    )
    if value.get("offset") is not None or (form == "columns" and duration is not None):
        if len(audio) != 1:
            raise DataError(
                f"offset belongs to one recording, the row has {len(audio)}; put it into the audio parts"
            )
        stretch = _stretch(audio[0], value.get("offset"), duration)
        messages = [_replaced(message, stretch) for message in messages]
        audio = [stretch]
    _check_answers(messages)
    if duration is None:
        duration = sum(map(audio_duration_s, audio))
    name = str(value["id"]) if form in ("conversations", "nvidia") else str(value.get("id", place))
    return DataRow(name, messages, tuple(audio), duration, place, value.get("task"), config.answer_weight)


def _check_answers(messages: Sequence[dict[str, Any]]) -> None:
    answers = [text_of(message) for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("there is no answer (assistant message) to learn")
    if not all(answer.strip() for answer in answers):
        raise DataError("the answer is empty")


def _with_members(value: dict[str, Any], members: Mapping[str, StoredAudio]) -> dict[str, Any]:
    """A row of a shard with the recordings beside it, where it does not name them itself."""
    beside = list(dict.fromkeys(members.values()))
    if not beside:
        return value
    if "conversations" in value:
        return value if "sound" in value else {**value, "sound": beside}
    if "messages" in value:
        return value if "audios" in value or form_of(value) != "swift" else {**value, "audios": beside}
    if any(name in value for name in AUDIO_COLUMNS):
        return value
    if len(beside) > 1:
        raise DataError(
            f"there are {len(beside)} recordings beside it; the row must name the one it is about"
        )
    return {**value, "audio": beside[0]}


def _resolve_audio(
    messages: list[dict[str, Any]], folder: Path, members: Mapping[str, StoredAudio]
) -> tuple[list[dict[str, Any]], list[AudioOfRow]]:
    """Makes audio paths absolute, checks that the files are there, and turns `offset` and `duration` into stretches."""
    plain = [_replaced(message, None) for message in messages]
    parse_conversations(plain)
    audio: list[AudioOfRow] = []
    resolved = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "audio":
                    if "path" not in part:
                        raise DataError("audio parts of a data set need a 'path'")
                    found = _find(part["path"], folder, members)
                    if part.get("offset") is not None or part.get("duration") is not None:
                        found = _stretch(found, part.get("offset"), part.get("duration"))
                    audio.append(found)
                    part = {"type": "audio", "path": found}
                parts.append(part)
            content = parts
        resolved.append({"role": message["role"], "content": content})
    return resolved, audio


def _find(path: Any, folder: Path, members: Mapping[str, StoredAudio]) -> AudioOfRow:
    if isinstance(path, StoredAudio):
        return path
    if not isinstance(path, str):
        raise DataError(f"a recording is named by its path, got {path!r:.80}")
    if path in members:
        return members[path]
    if "://" in path:
        raise DataError(f"{path!r} is an address; data sets are read from files, so fetch it first")
    if not (folder / path).is_file():
        raise DataError(f"there is no audio file {str(folder / path)!r}")
    return str(folder / path)


def _stretch(audio: AudioOfRow, offset: Any, duration: Any) -> StoredAudio:
    whole = StoredAudio(audio) if isinstance(audio, str) else audio
    length = None if duration is None else float(duration)
    return dataclasses.replace(whole, start_s=float(offset or 0.0), duration_s=length)


def _replaced(message: dict[str, Any], audio: AudioOfRow | None) -> dict[str, Any]:
    """A message with another recording in its audio parts, or with nothing but the path in them."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {key: value for key, value in part.items() if key not in ("offset", "duration")}
        | ({} if audio is None else {"path": audio})
        if isinstance(part, Mapping) and part.get("type") == "audio"
        else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def audio_duration_s(audio: AudioOfRow) -> float:
    """Seconds of a recording, from its header, or of the stretch of it."""
    import av

    stored = StoredAudio(audio) if isinstance(audio, str) else audio
    if stored.duration_s is not None:
        return stored.duration_s
    source = stored.source()
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source, mode="r") as container:
            if container.duration:
                return max(0.0, float(container.duration) / 1_000_000 - stored.start_s)
    except (OSError, ValueError) as error:
        raise DataError(f"{str(stored)!r} cannot be opened as audio: {error}") from error
    return len(load_audio(stored)) / SAMPLING_RATE
