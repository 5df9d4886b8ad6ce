"""The files of a corpus, the shards that workers take, and the record of a file: one line of JSON.

    {"source": name, "error": null, "duration_s": 3.2, "text": "...", "no_speech": false,
     "segments": [{"start_s": ...}, ...]}

A file that failed has its error in place of null, no duration and an empty transcript.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.writers import json_line, transcript_content

if TYPE_CHECKING:
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
    from audioflamingo.processor import AudioFlamingo3Processor


@dataclass(frozen=True)
class CorpusFile:
    """One audio file.

    Attributes:
        name: what its record is called; no two files of a corpus share one.
        source: an absolute path or a URL that every node of the cluster can read.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Shard:
    """Files that one worker transcribes together; what is done again if it dies meanwhile.

    Attributes:
        index: its place in the corpus, from 0 on.
        files: one or more.
    """

    index: int
    files: tuple[CorpusFile, ...]

    def to_row(self) -> dict[str, int | str]:
        """A row of a Ray data set; the files as JSON, which every version of Arrow keeps as it is."""
        return {"index": self.index, "files": json.dumps([(file.name, file.source) for file in self.files])}

    @classmethod
    def from_row(cls, row: dict[str, int | str]) -> Self:
        """What `to_row` was called on."""
        files = tuple(CorpusFile(name, source) for name, source in json.loads(str(row["files"])))
        return cls(int(row["index"]), files)


def transcribe_shard(
    options: TranscriptionOptions,
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    row: dict[str, Any],
) -> list[str]:
    """The records of the files in the row of a shard."""
    return transcribe_files(model, processor, Shard.from_row(row).files, options)


def cut_shards(files: Sequence[CorpusFile], shard_size: int) -> list[Shard]:
    """Cuts files into shards of `shard_size`, in order; the last one may be smaller."""
    starts = range(0, len(files), shard_size)
    return [Shard(index, tuple(files[start : start + shard_size])) for index, start in enumerate(starts)]


def transcript_record(name: str, segments: Sequence[Segment], duration_s: float) -> str:
    """The line of a file that was transcribed, its line feed included."""
    return _record(name, None, segments, duration_s)


def error_record(name: str, error: str) -> str:
    """The line of a file that failed, its line feed included."""
    return _record(name, " ".join(error.split()), (), None)


def _record(name: str, error: str | None, segments: Sequence[Segment], duration_s: float | None) -> str:
    content = transcript_content(segments, name, duration_s)
    return json_line({"source": content.pop("source"), "error": error, **content})


def transcribe_files(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    files: Sequence[CorpusFile],
    options: TranscriptionOptions,
) -> list[str]:
    """Transcribes files together and gives the record of each, in order."""
    from audioflamingo.transcription.transcriber import transcribe_all

    segments: list[list[Segment]] = [[] for _ in files]
    records = []
    events = transcribe_all(model, processor, (file.source for file in files), options=options)
    for index, event in events:
        if isinstance(event, Segment):
            segments[index].append(event)
        elif event.error is not None:
            records.append(error_record(files[index].name, str(event.error) or type(event.error).__name__))
        else:
            records.append(transcript_record(files[index].name, segments[index], event.duration_s))
    assert len(records) == len(files)
    return records
