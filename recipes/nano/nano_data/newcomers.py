"""What newcomers ask first, about clips whose speaker, words and length are known from their synthesis."""

from __future__ import annotations

import random
import re
from typing import Any

from .messages import Clip, Prompts
from .normalise import ONES, SCALES, TENS, number_words
from .templates import nouns, read_lists

WOMEN = {
    "hibari": ("heart",),
    "pico": ("en-US", "en-GB"),
    "flite": ("slt",),
    "festival": ("cmu_us_slt_arctic_hts",),
}
MEN = {"piper": ("joe",), "flite": ("awb", "rms", "kal16"), "festival": ("kal_diphone", "ked_diphone")}
SURE_SHIFT = {"woman": (0.93, 1.3), "man": (0.7, 1.08)}  # a voice shifted further might be taken for either
SCALE_NAMES = {name for _, name in SCALES}
NUMBER_WORDS = {*ONES, *TENS[1:], *SCALE_NAMES} - {"one"}
NO_SPEECH = "There is no speech in this clip."
# As many tokens in front of the quote as in a transcript's answer: by them the model knows where its words begin.
DESCRIPTIONS = {
    "woman": 'A woman is speaking and she says "{text}".',
    "man": 'A man is speaking and he says "{text}".',
    "": 'Someone is speaking, and they say "{text}".',
}
NO_SUMMARY = 'I cannot summarize these words: "{text}".'
# A model of this size cannot repeat a question's word, nor say a part of what it hears: it quotes all of it.
LOOK_FOR_IT = 'Look for it in these words: "{text}".'
LAST_WORDS = 'It ends with the last words of "{text}".'
FIRST_WORDS = 'It starts with the first words of "{text}".'
KINDS = (
    "describe", "summarize", "language", "gender", "feeling", "last_words", "first_words", "duration", "music",
    "number", "name", "word", "speakers",
)  # fmt: skip
QUOTES = ("{word}", "{word}", "'{word}'", '"{word}"', '"{word}"')  # how a word stands in a question
EDGE_S = 12.0  # of questions about one of a clip's words: longer ones are left out


def voice_of(voice: dict[str, Any] | None) -> str:
    """ "woman" or "man" of a clip's voice, or "" where it is not sure."""
    if not voice:
        return ""
    engine, name, shift = voice["engine"], voice["name"], voice["shift"]
    for kind, table in (("woman", WOMEN), ("man", MEN)):
        low, high = SURE_SHIFT[kind]
        if name in table.get(engine, ()) and low <= shift <= high:
            return kind
    return ""


def numbers_in(text: str) -> list[str]:
    """Runs of number words of a normalised transcript."""
    runs: list[list[str]] = [[]]
    words = text.split()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        is_part = word == "one" and (bool(runs[-1]) or following in SCALE_NAMES)
        if word in NUMBER_WORDS or is_part:
            runs[-1].append(word)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def names_in(original: str, names: set[str]) -> list[str]:
    """First names that a cased transcript holds, each once."""
    return list(dict.fromkeys(word for word in re.findall(r"[A-Z][a-z]+", original) if word in names))


class Newcomer:
    """Questions and answers about one clip."""

    def __init__(self, prompts: Prompts, rng: random.Random, phrases: dict[str, str]) -> None:
        self.prompts, self.rng, self.phrases = prompts, rng, phrases
        self.names = set(read_lists()["first"])
        things = {name for name in nouns() if re.fullmatch("[a-z]{4,}", name)}
        self.other_words = sorted(things | set(OTHER_WORDS.split()))

    def pair(self, kind: str, clip: Clip) -> tuple[str, str] | None:
        """(question, answer) of a kind about a clip; None where the clip does not suit it."""
        if kind == "word":
            return self._word(clip) if clip.label == "speech" else None
        answer = self.answer(kind, clip)
        return (self.prompts.draw(kind, self.rng), answer) if answer else None

    def answer(self, kind: str, clip: Clip) -> str | None:
        """The answer to any question of a kind but "word"; None where the clip does not suit it."""
        is_speech = clip.label == "speech"
        return getattr(self, f"_{kind}")(clip) if is_speech else self._about_other(kind, clip)

    def _about_other(self, kind: str, clip: Clip) -> str | None:
        if kind in ("describe", "summarize"):
            return "Nothing can be heard." if clip.label == "silence" else f"This is {self._phrase(clip)}."
        return getattr(self, f"_{kind}")(clip) if kind in ("music", "duration") else NO_SPEECH

    def _phrase(self, clip: Clip) -> str:
        phrase = self.phrases.get(clip.label, f"music played on the {clip.label}")
        return phrase if clip.label not in self.phrases or clip.label == "music" else f"the sound of {phrase}"

    def _describe(self, clip: Clip) -> str:
        return DESCRIPTIONS[clip.voice].format(text=clip.original)

    def _summarize(self, clip: Clip) -> str:
        return NO_SUMMARY.format(text=clip.original)

    def _language(self, clip: Clip) -> str:
        return "The language is English."

    def _gender(self, clip: Clip) -> str | None:
        return f"The speaker is a {clip.voice}." if clip.voice else None

    def _feeling(self, clip: Clip) -> str:
        return "I cannot tell how the speaker feels."

    def _speakers(self, clip: Clip) -> str:
        return "One person is speaking."

    def _last_words(self, clip: Clip) -> str:
        return LAST_WORDS.format(text=clip.original)

    def _first_words(self, clip: Clip) -> str:
        return FIRST_WORDS.format(text=clip.original)

    def _duration(self, clip: Clip) -> str:
        seconds = max(1, round(clip.duration_s))
        return f"It lasts about {number_words(seconds)} second{'' if seconds == 1 else 's'}."

    def _music(self, clip: Clip) -> str:
        is_music = (clip.label not in self.phrases and clip.label != "silence") or clip.label == "music"
        return "Yes, there is music." if is_music else "No, there is no music."

    def _number(self, clip: Clip) -> str | None:
        numbers = numbers_in(clip.text)
        if clip.duration_s > EDGE_S or len(numbers) > 1:
            return None
        if not numbers:
            return None if "one" in clip.text.split() else "No number is mentioned."
        return f"The number is {numbers[0]}."

    def _name(self, clip: Clip) -> str | None:
        names = names_in(clip.original, self.names)
        if clip.duration_s > EDGE_S or len(names) > 1:
            return None
        return f"The name is {names[0]}." if names else "No name is mentioned."

    def _word(self, clip: Clip) -> tuple[str, str] | None:
        words = [word for word in clip.text.split() if len(word) > 3]
        if not words or clip.duration_s > EDGE_S:
            return None
        word = self.rng.choice(words if self.rng.random() < 0.5 else self.other_words)
        word = self.rng.choice(QUOTES).format(word=word)
        return self.prompts.draw("word", self.rng).format(word=word), LOOK_FOR_IT.format(text=clip.original)


OTHER_WORDS = """
garden window morning friend number yellow winter doctor kitchen pound letter tomorrow water evening station animal
little press record coffee mother school music silver extension directory mailbox weather
"""
