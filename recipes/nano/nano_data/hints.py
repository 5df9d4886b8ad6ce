"""Hints behind the instruction to transcribe: what a client of the server gives as `prompt`."""

from __future__ import annotations

import random
import re

from .messages import Clip
from .templates import nouns, read_lists

HINTED = "{prompt} Context: {hint}"  # as the package's server puts it
MAX_TERMS = 4
SENTENCE_SHARE = 0.4  # of hints: what was said before, not terms
OWN_SHARE = 0.5  # of lists of terms: with one that the clip says
TERM = re.compile(r"(?<!^)[A-Z][a-z]+|[a-z]{7,}")


def with_hint(prompt: str, hint: str) -> str:
    """An instruction with what is known about the clip."""
    return HINTED.format(prompt=prompt, hint=hint)


class Hints:
    """Hints to the words of clips, helpful or not: a model must neither repeat them nor be led astray.

    Args:
        sentences: transcripts of other clips.
    """

    def __init__(self, sentences: list[str]) -> None:
        lists = read_lists()
        self.sentences = sentences
        self.terms = sorted({*lists["first"], *lists["last"], *lists["city"], *nouns()})

    def draw(self, clip: Clip, rng: random.Random) -> str:
        """Another clip's sentence, or a few terms between commas."""
        if self.sentences and rng.random() < SENTENCE_SHARE:
            return rng.choice(self.sentences)
        terms = rng.sample(self.terms, rng.randint(1, MAX_TERMS))
        own = TERM.findall(clip.original)
        if own and rng.random() < OWN_SHARE:
            terms[rng.randrange(len(terms))] = rng.choice(own)
        return ", ".join(terms)
