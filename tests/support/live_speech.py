"""Speech that comes bit by bit, and a script that hears a word a second of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from audioflamingo.audio.loading import load_audio
from tests.support.scripted_model import framed

SPEECH = Path(__file__).parents[1] / "data" / "directory_prompt.flac"
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def count_seconds(seconds: float, attempt: int) -> str:
    """A word a second: what is heard grows with the speech, and begins alike."""
    return framed(" ".join(NUMBERS[: int(seconds)]))


def talk_with_pauses() -> np.ndarray:
    """16 kHz: a second of silence, 4 s of speech, 2 s of silence, 3 s of speech, 2 s of silence."""
    speech = load_audio(SPEECH)
    parts = [np.zeros(16000), speech[:64000], np.zeros(32000), speech[:48000], np.zeros(32000)]
    return np.concatenate(parts).astype(np.float32)


def pcm(waveform: np.ndarray) -> bytes:
    """16 bits, little-endian."""
    return (np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()
