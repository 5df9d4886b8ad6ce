"""What long transcription gives: segments, and the end of each source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from audioflamingo.engine.finish_reason import FinishReason


@dataclass(frozen=True)
class Word:
    """A word and when it was said.

    Attributes:
        text: between two spaces, its punctuation included.
        start_s, end_s: in the source.
        probability: geometric mean of its tokens' under the model; None if it gave none.
    """

    text: str
    start_s: float
    end_s: float
    probability: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        probability = None if self.probability is None else round(self.probability, 4)
        return {
            "word": self.text,
            "start_s": round(self.start_s, 3),
            "end_s": round(self.end_s, 3),
            "probability": probability,
        }


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
        words: its words with their times; None if nobody asked for them.
        words_certainty: share of the model's attention that lies where the words are said to be: near 1 the times are
            good, below .4 they are rough.
        logprobs: of the tokens, while words are to be timed.
        window: what was heard, likewise.
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
    words: tuple[Word, ...] | None = None
    words_certainty: float | None = None
    logprobs: tuple[float, ...] = field(default=(), repr=False, compare=False)
    window: Any = field(default=None, repr=False, compare=False)

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
            **self._words_dict(),
        }

    def _words_dict(self) -> dict[str, Any]:
        if self.words is None:
            return {}
        certainty = None if self.words_certainty is None else round(self.words_certainty, 3)
        return {"words": [word.to_dict() for word in self.words], "words_certainty": certainty}


@dataclass(frozen=True)
class Finished:
    """The end of a source.

    Attributes:
        duration_s: seconds of audio that were read.
        error: why it ended before its time; None if all went well.
    """

    duration_s: float
    error: Exception | None = None

    is_done: ClassVar[bool] = True  # nothing has to be waited for, unlike for a window


def has_speech(segments: Iterable[Segment]) -> bool:
    """Whether words were heard: a transcript without any is said to have none."""
    return any(segment.text.strip() for segment in segments)
