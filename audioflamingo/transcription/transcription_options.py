"""Options of long transcription, checked when built. The command's flags are made of the same fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from audioflamingo.audio.reading import ChannelChoice, Reading
from audioflamingo.config import CHUNK_LENGTH_S, DEFAULT_TRANSCRIPTION_PROMPT
from audioflamingo.errors import ArgumentError, reason_of
from audioflamingo.fields import check_fields, check_value, option, same_option

_MODEL = "Model"
_SPEECH = "Finding speech"
MAX_PATH = 1000  # characters
TEXT_ENDINGS = (".txt", ".csv", ".tsv", ".lst", ".list", ".md", ".json", ".jsonl")


@dataclass(frozen=True)
class VadOptions:
    """Where speech is, and where long speech is cut."""

    threshold: float = option(0.5, "Speech starts where its probability reaches this.", group=_SPEECH)
    end_threshold: float = option(0.35, "Speech may end where its probability is below this.", is_flag=False)
    min_speech_ms: float = option(100.0, "Shorter stretches of speech are taken for noise.", is_flag=False)
    min_silence_ms: float = option(800.0, "A pause this long ends a segment.", group=_SPEECH)
    max_pause_ms: float = option(
        0.0,
        "Speech with pauses of up to this stays together, as far as it fits into a segment: heard in its context, with "
        "fewer questions to the model, but fewer times. 0: every pause of min_silence_ms ends a segment.",
        group=_SPEECH,
    )
    pad_ms: float = option(
        200.0,
        "Audio kept before and after speech, half the pause where two segments meet.",
        is_flag=False,
    )
    max_window_s: float = option(
        float(CHUNK_LENGTH_S),
        f"Longest segment, at most {CHUNK_LENGTH_S}; longer speech is cut at its quietest place.",
        group=_SPEECH,
    )
    cut_search_s: float = option(
        10.0, "How far before `max_window_s` the quietest place may lie.", is_flag=False
    )

    def __post_init__(self) -> None:
        check_value(0 < self.threshold <= 1, "threshold", self.threshold, "a probability in (0, 1]")
        is_allowed = 0 <= self.end_threshold <= self.threshold
        check_value(is_allowed, "end_threshold", self.end_threshold, "in [0, threshold]")
        for name in ("min_speech_ms", "min_silence_ms", "pad_ms"):
            value = getattr(self, name)
            check_value(math.isfinite(value) and 0 <= value <= 10_000, name, value, "in [0, 10000] ms")
        is_allowed = math.isfinite(self.max_pause_ms) and 0 <= self.max_pause_ms <= CHUNK_LENGTH_S * 1000
        check_value(is_allowed, "max_pause_ms", self.max_pause_ms, f"in [0, {CHUNK_LENGTH_S * 1000}] ms")
        is_allowed = 1 <= self.max_window_s <= CHUNK_LENGTH_S
        check_value(is_allowed, "max_window_s", self.max_window_s, f"in [1, {CHUNK_LENGTH_S}] s")
        check_value(self.cut_search_s >= 0, "cut_search_s", self.cut_search_s, "at least 0 s")
        longest_pad_ms = self.max_window_s * 1000 / 4
        check_value(self.pad_ms <= longest_pad_ms, "pad_ms", self.pad_ms, "at most a quarter of max_window_s")

    @classmethod
    def from_flags(cls, threshold: float, **values: Any) -> Self:
        """Speech does not end above where it starts: a low `threshold` takes the `end_threshold` along."""
        return cls(threshold, min(cls.end_threshold, threshold), **values)


@dataclass(frozen=True)
class TranscriptionOptions:
    """How long audio is transcribed."""

    batch_size: int = option(8, "Windows that run together.", at_least=1, group=_MODEL)
    prompt: str | None = option(
        None, f'Instruction; by default the checkpoint\'s ("{DEFAULT_TRANSCRIPTION_PROMPT}").', group=_MODEL
    )
    max_new_tokens: int = option(500, "Most tokens for one segment.", at_least=1, group=_MODEL)
    num_beams: int | None = option(
        None,
        "Beams of beam search, which takes longer; 1 is greedy. By default the checkpoint's, 1 for nano and Audio "
        "Flamingo 3.",
        at_least=1,
        group=_MODEL,
    )
    adapter: str | None = option(
        None, "Name of the loaded adapter that answers; None for the model itself.", is_flag=False
    )
    word_timestamps: bool = option(
        False,
        "Say when each word was said, and cut subtitles at words: 42 characters a line, 7 s. From the model's own "
        "attention; words_certainty says how clear it is.",
        group=_MODEL,
    )
    use_vad: bool = option(
        True,
        "Only what is speech. Otherwise all but digital silence, cut at its quietest places: for singing, whispering, "
        "or sounds.",
        group=_SPEECH,
    )
    vad: VadOptions = field(default_factory=VadOptions)
    retry_ngram_size: int = option(
        4,
        "An answer that got into a loop is tried again with this many tokens in a row forbidden to come back; 0 skips "
        "that.",
        at_least=0,
        is_flag=False,
    )
    min_split_s: float = option(
        4.0,
        "What still loops, or is not finished at `max_new_tokens`, is tried in two halves if it is at least this long.",
        at_least=1.0,
        is_flag=False,
    )
    hot_words: tuple[str, ...] = option(
        (),
        "Names and terms to listen for: a text file with one in each line, or a list with commas; may be repeated.",
        flag="--hotwords",
        metavar="FILE|WORDS",
        group=_MODEL,
    )
    start_s: float | None = option(
        None,
        "Begin here in the recording: seconds, or as in 1:02:03.5 or 2m30s. Times stay those of the recording.",
        at_least=0.0,
        is_time=True,
        flag="--start",
        group="Audio",
    )
    end_s: float | None = option(
        None, "End here, likewise.", above=0.0, is_time=True, flag="--end", group="Audio"
    )
    track: int | None = same_option(Reading, "track")
    channel: ChannelChoice = same_option(Reading, "channel")
    allow_damaged: bool = same_option(Reading, "allow_damaged")

    def __post_init__(self) -> None:
        check_fields(self)
        for word in self.hot_words:
            is_word = isinstance(word, str) and any(map(str.isalnum, word))
            check_value(is_word, "hot_words", word, "texts with a letter or digit each")
        check_value(isinstance(self.vad, VadOptions), "vad", self.vad, "VadOptions")
        if self.end_s is not None:
            check_value(
                self.end_s > (self.start_s or 0), "end_s", self.end_s, f"above start_s={self.start_s}"
            )
        _ = self.reading  # checks itself

    @classmethod
    def from_flags(cls, hot_words: tuple[str, ...], **values: Any) -> Self:
        """Hot words are read from their files."""
        return cls(hot_words=tuple(word for given in hot_words for word in read_words(given)), **values)

    def part_s(self, duration_s: float) -> float:
        """Seconds of a recording of this length that are transcribed."""
        end_s = duration_s if self.end_s is None else min(self.end_s, duration_s)
        return max(0.0, end_s - (self.start_s or 0.0))

    @property
    def reading(self) -> Reading:
        """What is taken of a source."""
        return Reading(self.track, self.channel, self.allow_damaged)


def read_words(given: str) -> list[str]:
    """Hot words of a text file, one in each line, or of a list with commas.

    Raises:
        ArgumentError: the file is not there, cannot be read or holds no word.
    """
    path = Path(given).expanduser()
    try:
        if len(given) > MAX_PATH or not path.exists():
            if _seems_path(given):
                raise ArgumentError(
                    f"there is no file of hot words {given!r:.200}. If this is a word itself, put a comma behind it."
                )
            return [word.strip() for word in given.split(",") if word.strip()]
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"cannot read the hot words in {given!r:.200}: {reason_of(error)}.") from error
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not any(character.isalnum() for word in words for character in word):
        raise ArgumentError(f"the file of hot words {given!r:.200} holds none: it has one in each line.")
    if any("\0" in word for word in words):
        raise ArgumentError(f"the file of hot words {given!r:.200} is no text: it has zero bytes.")
    return words


def _seems_path(given: str) -> bool:
    """Whether a text that names no file was meant to: it has a text file's ending, or begins as a path does."""
    is_list = "," in given
    return not is_list and (
        given.lower().endswith(TEXT_ENDINGS) or given.startswith(("/", "./", "../", "~/"))
    )
