"""Questions about recordings that are longer than the model takes: asked of each stretch, then once more.

No model hears such a recording as a whole here. Each stretch is asked alone, and the answers are put to the model with
their times, as text, for one answer: what takes two stretches to hear (a theme that returns, a contradiction) is known
only as far as the answers say it. Whatever runs the model asks; what it asks is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.audio.vad import VAD_FRAME, frame_levels
from audioflamingo.errors import PromptError
from audioflamingo.processor.thoughts import split_thoughts

SEARCH_S = 5.0  # a stretch ends at the quietest place this far around its even share

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Stretch:
    """A part of a recording that was asked for itself.

    Attributes:
        clip: which clip of the conversation it is of, from 1 on.
        start_s, end_s: where it lies in the clip.
        answer: what the model said about it, without its thoughts.
    """

    clip: int
    start_s: float
    end_s: float
    answer: str

    @property
    def times(self) -> str:
        """`HH:MM:SS - HH:MM:SS`."""
        return f"{_clock(self.start_s)} - {_clock(self.end_s)}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return {**asdict(self), "start_s": round(self.start_s, 3), "end_s": round(self.end_s, 3)}


class LongQuestion:
    """A conversation whose last question is about clips that are too long.

    Args:
        messages: the conversation; its audio parts hold 16 kHz waveforms under "audio".
        max_clip_s: longest clip that the model takes, in seconds.

    Raises:
        PromptError: the last message is no question.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], max_clip_s: float) -> None:
        self._messages = [dict(message) for message in messages]
        if self._messages[-1]["role"] != "user":
            raise PromptError("on_long='windows' needs a question: the last message must be the user's.")
        self._places: list[tuple[int, slice]] = []  # clip, samples of it
        self._long: set[int] = set()
        max_samples = int(max_clip_s * SAMPLING_RATE)
        for number, waveform in enumerate(clips_in(messages), 1):
            if len(waveform) > max_samples:
                self._long.add(number)
                self._places += [(number, part) for part in cut_stretches(waveform, max_samples)]

    def conversations(self) -> list[Messages]:
        """The question put to each stretch: the conversation with it in place of its clip, without other long clips."""
        return [self._replaced({clip: part}) for clip, part in self._places]

    def stretch(self, index: int, answer: str) -> Stretch:
        """The stretch that the conversation of this index asks, with its answer."""
        clip, part = self._places[index]
        return Stretch(
            clip, part.start / SAMPLING_RATE, part.stop / SAMPLING_RATE, split_thoughts(answer)[1].strip()
        )

    def final(self, stretches: Sequence[Stretch]) -> Messages:
        """The last conversation: the answers of the stretches as text; clips that were not too long stay."""
        messages = self._replaced({})
        asked: str | list[Any] = messages[-1]["content"]
        content = [{"type": "text", "text": asked}] if isinstance(asked, str) else asked
        parts = [part for part in content if part["type"] != "text"]
        question = "".join(part["text"] for part in content if part["type"] == "text")
        has_several = len(self._long) > 1
        answers = [f"[{_name(s) if has_several else ''}{s.times}] {_one_line(s.answer)}" for s in stretches]
        text = (
            f"{question}\n\nThe recording is too long to be heard at once, so each part was asked this by itself. "
            "These are the parts and their answers:\n"
            + "\n".join(answers)
            + "\n\nFrom these, give one answer for the "
            "whole recording."
        )
        messages[-1]["content"] = [*parts, {"type": "text", "text": text}]
        return messages

    def _replaced(self, kept: Mapping[int, slice]) -> Messages:
        """The conversation with parts of long clips in their places; a long clip of which none is kept is left out."""
        number = 0
        messages: Messages = []
        for message in self._messages:
            if isinstance(message["content"], str):
                messages.append(message)
                continue
            content: list[Any] = []
            for part in message["content"]:
                if part["type"] == "audio":
                    number += 1
                    if number in self._long and number not in kept:
                        continue
                    if number in kept:
                        part = {**part, "audio": part["audio"][kept[number]]}
                content.append(part)
            messages.append({**message, "content": content or [{"type": "text", "text": "(a recording)"}]})
        return messages


def long_question(messages: Sequence[Mapping[str, Any]], max_clip_s: float) -> LongQuestion | None:
    """A question about clips of which at least one is too long; None if the model takes them all."""
    is_long = any(len(waveform) > max_clip_s * SAMPLING_RATE for waveform in clips_in(messages))
    return LongQuestion(messages, max_clip_s) if is_long else None


def clips_in(messages: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The waveforms of a conversation, in order."""
    return [
        part["audio"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "audio"
    ]


def cut_stretches(waveform: np.ndarray, max_samples: int) -> list[slice]:
    """Cuts samples into as few stretches as possible, nearly even ones, each at a quiet place.

    Args:
        waveform: float32 (samples,).
        max_samples: longest stretch.
    """
    num_stretches = math.ceil(len(waveform) / max_samples)
    share = len(waveform) / num_stretches
    reach = int(min(SEARCH_S * SAMPLING_RATE, (max_samples - share) / 2))
    cuts = [0]
    for number in range(1, num_stretches):
        middle = round(number * share)
        levels = frame_levels(waveform[middle - reach : middle + reach])
        offset = int(np.argmin(levels)) * VAD_FRAME - reach if len(levels) else 0
        cuts.append(middle + offset)
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(waveform)], strict=True)]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


def _name(stretch: Stretch) -> str:
    return f"clip {stretch.clip}, "


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(no answer)"
