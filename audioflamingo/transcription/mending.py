"""What becomes of one window's answer: a segment, another try without repetition, or two halves.

The rules stand here once, as a generator that asks for answers; whoever runs the model drives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from audioflamingo.engine.finish_reason import FinishReason
from audioflamingo.engine.loops import find_loop
from audioflamingo.processor.processor import AudioFlamingo3Processor
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window

MAX_SPLITS = 2  # times that a window is halved


@dataclass
class Answer:
    """What the model said about one window, as it came."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    loop_start: int | None = None

    @property
    def is_good(self) -> bool:
        """Whether it came to an end by itself, without a loop."""
        return self.finish_reason == "stop"

    def find_loop(self) -> None:
        """Looks for a loop in the finished answer."""
        self.loop_start = find_loop(self.tokens)
        if self.loop_start is not None:
            self.finish_reason = "loop"


@dataclass(frozen=True)
class Ask:
    """Windows to be answered, each for itself.

    Attributes:
        windows: they.
        no_repeat_ngram_size: so many tokens in a row must not come back; 0 for no such rule.
    """

    windows: tuple[Window, ...]
    no_repeat_ngram_size: int = 0


def mend(
    window: Window,
    answer: Answer,
    options: TranscriptionOptions,
    processor: AudioFlamingo3Processor,
    depth: int = 0,
) -> Generator[Ask, Any, list[Segment]]:
    """Makes segments of a window.

    Args:
        window: the stretch of audio.
        answer: what the model said about it.
        options: what to try where the answer is not good.
        processor: turns ids into text.
        depth: how often the window was halved already.

    Yields:
        What else is to be answered; wants a list of as many `Answer`.

    Returns:
        Segments in order.
    """
    if answer.is_good:
        return [segment_of(window, answer, processor)]
    if answer.finish_reason == "loop" and options.retry_ngram_size:
        (again,) = yield Ask((window,), options.retry_ngram_size)
        if again.is_good:
            return [segment_of(window, again, processor, "retried")]
    if depth < MAX_SPLITS and window.end_s - window.start_s >= options.min_split_s:
        halves = window.halves()
        answers = yield Ask(halves)
        parts: list[Segment] = []
        for half, half_answer in zip(halves, answers, strict=True):
            parts += yield from mend(half, half_answer, options, processor, depth + 1)
        return [dataclasses.replace(p, flags=tuple(dict.fromkeys((*p.flags, "split")))) for p in parts]
    return [segment_of(window, answer, processor)]


def segment_of(window: Window, answer: Answer, processor: AudioFlamingo3Processor, *flags: str) -> Segment:
    """The segment of a window that was answered."""
    tokens = answer.tokens[: answer.loop_start]  # a loop is cut where it begins; None cuts nothing
    text = str(processor.decode(tokens, skip_special_tokens=True, strip_prefix=True))
    logprobs = answer.logprobs[: len(tokens)]
    all_flags = [*flags, *(["cut"] if window.is_cut else []), *([] if text else ["no_words"])]
    return Segment(
        start_s=window.start_s,
        end_s=window.end_s,
        text=text,
        tokens=tuple(tokens),
        avg_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        finish_reason=answer.finish_reason,
        flags=tuple(all_flags),
        speech_probability=window.speech_probability,
        channel=window.channel,
        logprobs=tuple(logprobs),
        window=window,
    )
