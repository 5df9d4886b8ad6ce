"""Hot words: names and terms of the user, put where a transcript is spelled alike, if the audio allows.

The model first writes what it hears. Where that has words whose letters are like a phrase's, it says how likely the
whole answer is with the phrase in their place, and a phrase that costs little stays. So whole phrases are compared, to
the end of the answer: a bonus for each token while decoding (Zhao et al., 2019), tried first, drew other words to the
phrases too. Nothing stands in the prompt: no phrase comes up in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from audioflamingo.engine.likelihood import OptionScore, score
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription.segments import Segment

MIN_LIKENESS = 0.65  # of letters (difflib's ratio); below it another word was said
WORTH = 4.0  # of a phrase: the log-probability that an answer may lose by it
MAX_PLACES = 12  # that the model is asked about, in a segment
MAX_COMPARED = 30  # phrases, letter by letter, with a stretch of a transcript
MAX_WORDS = 3  # of a transcript, in whose place one phrase stands
_BUCKETS = 64  # for letters; two in one bucket make a phrase only seem more alike than it is
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Place:
    """Where a phrase could stand.

    Attributes:
        start, end: of what stands there, in the text.
        phrase: as it would be written there.
        likeness: of the letters, from 0 to 1.
    """

    start: int
    end: int
    phrase: str
    likeness: float


class HotWords:
    """Phrases, and the model that decides about them.

    Args:
        phrases: as they are to be written.
        model: wrote the transcripts.
        processor: its processor.
    """

    def __init__(
        self, phrases: Sequence[str], model: AudioFlamingo3WithHead, processor: AudioFlamingo3Processor
    ) -> None:
        self._model = model
        self._processor = processor
        self._written = {_letters(phrase): phrase for phrase in phrases}
        self._all_letters = list(self._written)
        self._counts = np.stack([_counts(letters) for letters in self._written])  # (phrases, buckets)
        self._lengths = self._counts.sum(1)

    def correct(self, segment: Segment, prompt: str | None, adapter: str | None) -> Segment:
        """The segment with the phrases in it, given the instruction and the adapter that it was written with."""
        places = self.places(segment.text)
        if not places:
            return segment
        answer = str(self._processor.decode(list(segment.tokens), skip_special_tokens=True))
        head, found, tail = answer.rpartition(segment.text)
        if segment.window is None or not found:
            return segment
        texts = [segment.text, *(_with(segment.text, [place]) for place in places)]
        asked = self._processor.transcription_prompt(segment.window.model_input, prompt)

        def ask(*texts: str) -> list[OptionScore]:
            answers = [head + text + tail for text in texts]
            return score(self._model, self._processor, asked, answers, adapter=adapter)

        before, *after = ask(*texts)
        chosen: list[Place] = []
        likeliest = sorted(zip(after, places, strict=True), key=lambda pair: -pair[0].logprob)
        for option, place in likeliest:
            is_free = all(place.end <= one.start or place.start >= one.end for one in chosen)
            if before.logprob - option.logprob < WORTH and is_free:
                chosen.append(place)
        if not chosen:
            return segment
        text = _with(segment.text, chosen)
        now = (
            likeliest[0][0] if len(chosen) == 1 else ask(text)[0]
        )  # the first that fits is the likeliest of all
        tokens = (*self._processor.tokenizer.encode_plain(head + text + tail), *segment.tokens[-1:])
        return replace(
            segment,
            text=text,
            tokens=tokens,
            avg_logprob=now.logprob / now.num_tokens,
            flags=(*segment.flags, "hot_words"),
            logprobs=(),  # not known for each
        )

    def places(self, text: str) -> list[Place]:
        """Where phrases could stand in a text, the likeliest first."""
        words = list(_WORD.finditer(text))
        found = []
        for first, word in enumerate(words):
            for last in words[first : first + MAX_WORDS]:
                said = text[word.start() : last.end()]
                if last is not word and re.search(r"[^\w\s'’-]", said):
                    break  # the end of a sentence or a part of one
                found += [
                    Place(word.start(), last.end(), _capitalised(phrase, text, word.start()), likeness)
                    for phrase, likeness in self._alike(said)
                ]
        return sorted(found, key=lambda place: -place.likeness)[:MAX_PLACES]

    def _alike(self, said: str) -> Iterator[tuple[str, float]]:
        letters = _letters(said)
        # As many letters can match at most; thousands of phrases are ranked by that, and few of them compared.
        shared = np.minimum(self._counts, _counts(letters)).sum(1)
        bound = 2 * shared / (self._lengths + len(letters))
        first = np.argsort(-bound, kind="stable")[:MAX_COMPARED]
        near = [self._all_letters[i] for i in first if bound[i] >= MIN_LIKENESS]
        for close in difflib.get_close_matches(letters, near, n=2, cutoff=MIN_LIKENESS):
            if close in letters:
                return  # it is there already, in the case of its place, alone or beside a word
            yield self._written[close], difflib.SequenceMatcher(None, close, letters).ratio()


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _counts(letters: str) -> np.ndarray:
    """How often the letters of each bucket occur, `(buckets,)`."""
    return np.bincount([ord(letter) % _BUCKETS for letter in letters], minlength=_BUCKETS).astype(np.int32)


def _capitalised(phrase: str, text: str, start: int) -> str:
    """A phrase in its place: at the beginning of a sentence with a capital."""
    before = text[:start].rstrip()
    return phrase[:1].upper() + phrase[1:] if not before or before[-1] in ".?!" else phrase


def _with(text: str, places: Sequence[Place]) -> str:
    """The text with phrases in their places."""
    for place in sorted(places, key=lambda place: -place.start):
        text = text[: place.start] + place.phrase + text[place.end :]
    return text
