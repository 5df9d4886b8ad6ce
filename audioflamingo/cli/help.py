"""Texts of the help pages that are not about one option."""

from __future__ import annotations

APP_HELP = "Audio Flamingo 3: transcribe, describe and discuss audio."
EPILOG = (
    "Examples:  af3 transcribe talk.mp3  ·  af3 transcribe recordings/ --format srt --output-dir subtitles"
    '  ·  af3 ask bird.wav "What is this?"'
)
