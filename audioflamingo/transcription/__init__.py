"""Long audio of any length -> a transcript in segments with true times.

The parts are imported when first used, so that reading the options costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from audioflamingo.lazy import lazy_names

if TYPE_CHECKING:
    from audioflamingo.transcription.segments import Finished, Segment
    from audioflamingo.transcription.transcriber import transcribe, transcribe_all
    from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions
    from audioflamingo.transcription.writers import FORMATS, format_transcript, write_transcript

_HOMES = {
    "TranscriptionOptions": "transcription_options",
    "VadOptions": "transcription_options",
    "Finished": "segments",
    "Segment": "segments",
    "transcribe": "transcriber",
    "transcribe_all": "transcriber",
    "FORMATS": "writers",
    "format_transcript": "writers",
    "write_transcript": "writers",
}

__all__ = [
    "FORMATS",
    "Finished",
    "Segment",
    "TranscriptionOptions",
    "VadOptions",
    "format_transcript",
    "transcribe",
    "transcribe_all",
    "write_transcript",
]

__getattr__ = lazy_names(__name__, _HOMES)
