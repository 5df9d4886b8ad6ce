"""What long transcription gives: segments, and the end of each source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from audioflamingo.engine.finish_reason import FinishReason


@dataclass(frozen=True)
class Segment:
    """What was said in one stretch of audio.

    Attributes:
        start_s, end_s: where the stretch lies in the source, from our own cuts.
        text: the transcript, without the sentence that the model wraps it in; empty if it heard no words.
        tokens: ids of the answer, its end token included.
        avg_logprob: mean log-probability of the tokens under the model; None if it gave none.
        finish_reason: "stop"; "length" if the answer was cut at `max_new_tokens`; "loop" if it repeated
            itself, was tried again in vain, and was cut where the loop began.
        flags: what else was done: "retried" (a loop, mended by forbidding repetition), "split" (tried in
            halves), "cut" (speech went on, and was cut at its quietest place), "no_words".
        speech_probability: of the voice detector, mean over the stretch; None if it was not asked.
        channel: name of the channel that it was heard on, where each was heard for itself.
    """

    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...] = ()
    avg_logprob: float | None = None
    finish_reason: FinishReason = "stop"
    flags: tuple[str, ...] = ()
    speech_probability: float | None = None
    channel: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them, times to the millisecond."""
        return {
            "start_s": round(self.start_s, 3),
            "end_s": round(self.end_s, 3),
            "text": self.text,
            "avg_logprob": None if self.avg_logprob is None else round(self.avg_logprob, 4),
            "finish_reason": self.finish_reason,
            "flags": list(self.flags),
            "tokens": list(self.tokens),
            **({} if self.channel is None else {"channel": self.channel}),
        }


@dataclass(frozen=True)
class Finished:
    """The end of a source.

    Attributes:
        duration_s: seconds of audio that were read.
        error: why it ended before its time; None if all went well.
    """

    duration_s: float
    error: Exception | None = None


def has_speech(segments: Iterable[Segment]) -> bool:
    """Whether words were heard: a transcript without any is said to have none."""
    return any(segment.text.strip() for segment in segments)
