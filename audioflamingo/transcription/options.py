"""Options of long transcription, checked when built. The command's flags take their defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from audioflamingo.config import CHUNK_LENGTH_S
from audioflamingo.errors import ArgumentError


@dataclass(frozen=True)
class VadOptions:
    """Where speech is, and where long speech is cut.

    Attributes:
        threshold: speech starts where its probability reaches this.
        end_threshold: speech may end where it is below this.
        min_speech_ms: shorter stretches of speech are taken for noise.
        min_silence_ms: a pause at least this long ends a segment.
        pad_ms: audio kept before and after speech, half the pause where two segments meet.
        max_window_s: longest segment; longer speech is cut at its quietest place.
        cut_search_s: how far before `max_window_s` that place may lie.
    """

    threshold: float = 0.5
    end_threshold: float = 0.35
    min_speech_ms: float = 100.0
    min_silence_ms: float = 800.0
    pad_ms: float = 200.0
    max_window_s: float = float(CHUNK_LENGTH_S)
    cut_search_s: float = 10.0

    def __post_init__(self) -> None:
        _check(0 < self.threshold <= 1, "threshold", self.threshold, "a probability in (0, 1]")
        _check(
            0 <= self.end_threshold <= self.threshold,
            "end_threshold",
            self.end_threshold,
            "in [0, threshold]",
        )
        for name in ("min_speech_ms", "min_silence_ms", "pad_ms"):
            value = getattr(self, name)
            _check(math.isfinite(value) and 0 <= value <= 10_000, name, value, "in [0, 10000] ms")
        _check(
            1 <= self.max_window_s <= CHUNK_LENGTH_S,
            "max_window_s",
            self.max_window_s,
            f"in [1, {CHUNK_LENGTH_S}] s",
        )
        _check(self.cut_search_s >= 0, "cut_search_s", self.cut_search_s, "at least 0 s")
        longest_pad_ms = self.max_window_s * 1000 / 4
        _check(self.pad_ms <= longest_pad_ms, "pad_ms", self.pad_ms, "at most a quarter of max_window_s")


@dataclass(frozen=True)
class TranscriptionOptions:
    """How long audio is transcribed.

    Attributes:
        batch_size: windows that run together.
        prompt: the instruction; None is the checkpoint's own ("Transcribe the input speech.").
        max_new_tokens: most tokens for one window.
        num_beams: beams of beam search, which hears better and takes longer; 1 is greedy. None is the checkpoint's
            own (`generation_config.json`).
        use_vad: find speech first. Without it everything but digital silence is transcribed, in windows that
            are cut at their quietest place: for singing, whispering, or sounds.
        vad: where speech is and where it is cut.
        retry_ngram_size: an answer that got into a loop is tried again with this many tokens in a row
            forbidden to come back; 0 skips that.
        min_split_s: what still loops, or is not finished at `max_new_tokens`, is tried in two halves if it is
            at least this long.
    """

    batch_size: int = 8
    prompt: str | None = None
    max_new_tokens: int = 500
    num_beams: int | None = None
    use_vad: bool = True
    vad: VadOptions = field(default_factory=VadOptions)
    retry_ngram_size: int = 4
    min_split_s: float = 4.0

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "max_new_tokens": 1, "num_beams": 1, "retry_ngram_size": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if name == "num_beams" and value is None:
                continue
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            _check(is_whole and value >= least, name, value, f"a whole number of at least {least}")
        _check(self.min_split_s >= 1, "min_split_s", self.min_split_s, "at least 1 s")
        _check(isinstance(self.vad, VadOptions), "vad", self.vad, "VadOptions")


def _check(is_allowed: bool, name: str, value: object, allowed: str) -> None:
    if not is_allowed:
        raise ArgumentError(f"{name} must be {allowed}, got {value!r}.")
