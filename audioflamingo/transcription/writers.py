"""Transcripts as files: txt, json, jsonl, srt, vtt, tsv.

Every format but json is a head and one piece a segment, so it can be printed while the audio is still being
transcribed. A file appears whole or not at all.
"""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audioflamingo.files import write_whole
from audioflamingo.transcription.segments import Segment, Word, has_speech

LINE_WIDTH = 42  # characters, as for television
CUE_LINES = 2
MAX_CUE_S = 7.0
CUE_PAUSE_S = 1.0  # silence that ends a cue


@dataclass(frozen=True)
class Format:
    """One way to write a transcript.

    Attributes:
        piece: text of a segment, given its number from 1 on and the name of the source.
        head: what stands before the first piece.
        skips_silence: whether segments without words are left out.
        is_whole: whether the pieces only make sense as one document (json).
        has_cues: whether segments are cut into pieces to be read at once.
    """

    piece: Callable[[int, Segment, str | None], str]
    head: str = ""
    skips_silence: bool = True
    is_whole: bool = False
    has_cues: bool = False


def time_stamp(seconds: float, decimal_mark: str = ".") -> str:
    """`HH:MM:SS.mmm`, rounded to the millisecond; hours beyond 99 take the digits they need."""
    total_ms = round(seconds * 1000)
    total_s, ms = divmod(total_ms, 1000)
    total_min, s = divmod(total_s, 60)
    h, m = divmod(total_min, 60)
    return f"{h:02d}:{m:02d}:{s:02d}{decimal_mark}{ms:03d}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def joined_text(segments: Iterable[Segment]) -> str:
    """The text of a whole transcript: on one line, or a line a segment where each channel was heard for itself."""
    spoken = [segment for segment in segments if segment.text.strip()]
    is_named = any(segment.channel is not None for segment in spoken)
    return ("\n" if is_named else " ").join(map(_named_line, spoken))


def _named_line(segment: Segment) -> str:
    """The text on one line, with the name of its channel where each was heard for itself."""
    text = _one_line(segment.text)
    return text if segment.channel is None else f"{segment.channel}: {text}"


def subtitle_cues(segment: Segment) -> list[Segment]:
    """A segment in pieces to be read at once, cut at words; the segment itself where its words have no times.

    A cue has at most two lines of 42 characters and lasts 7 s at most. It ends early with a sentence of half a line, or
    before a pause of a second.
    """
    if not segment.words:
        return [segment]
    cues: list[list[Word]] = [[]]
    for word in segment.words:
        cue = cues[-1]
        if cue and _ends_before(word, cue):
            cues.append([word])
        else:
            cue.append(word)
    return [
        replace(
            segment,
            start_s=cue[0].start_s,
            end_s=min(cue[-1].end_s, cue[0].start_s + MAX_CUE_S),
            text=" ".join(word.text for word in cue),
            words=tuple(cue),
        )
        for cue in cues
    ]


def _ends_before(word: Word, cue: list[Word]) -> bool:
    text = " ".join(part.text for part in cue)
    is_sentence = text.endswith((".", "?", "!")) and len(text) >= LINE_WIDTH / 2
    return (
        is_sentence
        or word.start_s - cue[-1].end_s >= CUE_PAUSE_S
        or word.end_s - cue[0].start_s > MAX_CUE_S
        or len(textwrap.wrap(f"{text} {word.text}", LINE_WIDTH)) > CUE_LINES
    )


def _lines(text: str, segment: Segment) -> str:
    """The text of a cue in lines, where it was cut to fit some."""
    return "\n".join(textwrap.wrap(text, LINE_WIDTH, break_long_words=False)) if segment.words else text


def _srt(number: int, segment: Segment, _: str | None) -> str:
    times = f"{time_stamp(segment.start_s, ',')} --> {time_stamp(segment.end_s, ',')}"
    return f"{number}\n{times}\n{_lines(_cue_text(_named_line(segment)), segment)}\n\n"


def _vtt(_: int, segment: Segment, __: str | None) -> str:
    times = f"{time_stamp(segment.start_s)} --> {time_stamp(segment.end_s)}"
    voice = "" if segment.channel is None else f"<v {segment.channel}>"
    text = _lines(_cue_text(segment.text), segment)
    return f"{times}\n{voice}{html.escape(text, quote=False)}\n\n"


def _cue_text(text: str) -> str:
    """A cue ends at an empty line and may not hold an arrow, which stands for times."""
    return _one_line(text).replace("-->", "->")


def _tsv(_: int, segment: Segment, __: str | None) -> str:
    return f"{round(segment.start_s * 1000)}\t{round(segment.end_s * 1000)}\t{_named_line(segment)}\n"


# Line ends to some readers, though not to JSON.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def json_line(content: dict[str, Any]) -> str:
    """An object as a line of JSON that every reader takes for one line."""
    return json.dumps(content, ensure_ascii=False).translate(_LINE_ENDS) + "\n"


def _jsonl(_: int, segment: Segment, source: str | None) -> str:
    named: dict[str, Any] = {} if source is None else {"source": source}
    return json_line({**named, **segment.to_dict()})


FORMATS: dict[str, Format] = {
    "txt": Format(lambda _, segment, __: _named_line(segment) + "\n"),
    "json": Format(_jsonl, skips_silence=False, is_whole=True),
    "jsonl": Format(_jsonl, skips_silence=False),
    "srt": Format(_srt, has_cues=True),
    "vtt": Format(_vtt, head="WEBVTT\n\n", has_cues=True),
    "tsv": Format(_tsv, head="start_ms\tend_ms\ttext\n"),
}


class Formatter:
    """Text of one transcript, piece by piece.

    Args:
        name: a key of `FORMATS` whose pieces stand for themselves.
        source: name of the audio, where the format has a place for it.
    """

    def __init__(self, name: str, source: str | None = None) -> None:
        self._format = FORMATS[name]
        self._source = source
        self._number = 0
        self.head = self._format.head

    def piece(self, segment: Segment) -> str:
        """The text of the next segment, possibly none."""
        if self._format.skips_silence and not segment.text.strip():
            return ""
        text = ""
        for part in subtitle_cues(segment) if self._format.has_cues else [segment]:
            self._number += 1
            text += self._format.piece(self._number, part, self._source)
        return text


def format_transcript(
    segments: Iterable[Segment], name: str, source: str | None = None, duration_s: float | None = None
) -> str:
    """The whole text of a transcript.

    Args:
        segments: in order.
        name: a key of `FORMATS`.
        source: name of the audio; json and jsonl hold it.
        duration_s: seconds of audio; json holds it.
    """
    if FORMATS[name].is_whole:
        content = transcript_content(segments, source, duration_s)
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    formatter = Formatter(name, source)
    return formatter.head + "".join(map(formatter.piece, segments))


def transcript_content(
    segments: Iterable[Segment], source: str | None, duration_s: float | None
) -> dict[str, Any]:
    """A whole transcript as JSON takes it; see `format_transcript`."""
    segments = list(segments)
    return {
        "source": source,
        "duration_s": None if duration_s is None else round(duration_s, 3),
        "text": joined_text(segments),
        "no_speech": not has_speech(segments),
        "segments": [segment.to_dict() for segment in segments],
    }


def write_transcript(
    path: Path,
    segments: Iterable[Segment],
    name: str,
    source: str | None = None,
    duration_s: float | None = None,
) -> None:
    """Writes a transcript; see `format_transcript`.

    Raises:
        OutputError: it cannot be written. What was there before is unchanged.
    """
    write_whole(path, format_transcript(segments, name, source, duration_s).encode())
