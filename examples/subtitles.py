"""Writes subtitles of a recording of any length: `python examples/subtitles.py film.mkv film.srt`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, transcribe
from audioflamingo.transcription import format_transcript

MODEL = os.environ.get("AF3_MODEL", "nano")

if __name__ == "__main__":
    source, target = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    segments = list(transcribe(model, processor, source))
    Path(target).write_text(format_transcript(segments, "srt"), encoding="utf-8")
    print(f"{target}: {len(segments)} subtitles")
