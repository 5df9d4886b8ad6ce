"""The record of a file: one line of JSON.

    {"source": name, "error": null, "duration_s": 3.2, "text": "...", "segments": [{"start_s": ...}, ...]}

A file that failed has its error in place of null, no duration and an empty transcript.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from audioflamingo.corpus.shards import CorpusFile
from audioflamingo.transcription.options import TranscriptionOptions
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.writers import json_line, transcript_content


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
    model: Any, processor: Any, files: Sequence[CorpusFile], options: TranscriptionOptions
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
