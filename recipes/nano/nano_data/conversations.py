"""Conversations about clips: each function makes one row of one kind from clips that it draws."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from .hints import Hints, with_hint
from .instruments import INSTRUMENTS
from .messages import (
    DEFAULT_PROMPT,
    Clip,
    Label,
    Prompts,
    assistant,
    choice_question,
    conversation,
    read_labels,
    read_table,
    transcription_answer,
    user,
)
from .newcomers import KINDS as NEWCOMERS_KINDS
from .newcomers import Newcomer
from .surroundings import surround_anew, surround_first
from .templates import nouns

MUSIC_QUESTIONS = (
    "This track feels really peaceful and introspective. "
    "What elements make it feel so calming and meditative?",
    "What is the mood of this music?",
    "What genre is this?",
    "Who is the composer?",
    "Which key is it in?",
)
NO_DETAIL = "I am a small model: I can tell that this is {what}, but I cannot describe it further."
SENTENCES_ANSWER = 'Someone might say "{text}".'
HINT_SHARE = 0.12  # of the instructions to transcribe
OTHER_SHARE = 0.2  # of newcomers' questions that are not about speech
# Of the clips without a number or a name, asked for one.
NONE_KEPT = {"train": 0.12, "valid": 0.3, "test": 0.3}
OPEN_WORDING = re.compile(
    r"^(?!.*\b(sound|noise|event))"
    r"(?=.*\b(hear|listening|happen|going on|descri|caption|explain|contain|tell me what|what is (this|it|that)\b))",
    re.IGNORECASE,
)
CAPITAL_QUESTIONS = (
    "What is the capital of {country}?",
    "What is the capital city of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital of {country}.",
    "Do you know the capital of {country}?",
)


class Maker:
    """Draws clips of one split and words conversations about them.

    Args:
        split: "train", "valid" or "test"; decides which wordings may be used.
        by_label: clips of sounds by label, with "speech" and "music" among them.
        instruments: clips of one instrument each, by instrument.
        quiet: clips whose transcript is empty.
        seed: of the random choices.
        spoken: speech that newcomers ask about (default: that of `by_label`).
    """

    def __init__(
        self,
        split: str,
        by_label: dict[str, list[Clip]],
        instruments: dict[str, list[Clip]],
        quiet: list[Clip],
        seed: str,
        spoken: list[Clip] | None = None,
    ):
        self.split, self.by_label, self.instruments, self.quiet = split, by_label, instruments, quiet
        self.spoken = by_label.get("speech", []) if spoken is None else spoken
        self.rng = random.Random(seed)
        self.labels: dict[str, Label] = read_labels()
        self.prompts = Prompts(split)
        self.asked = Newcomer(
            self.prompts, self.rng, {name: label.phrase for name, label in self.labels.items()}
        )
        self.hints = Hints([clip.original for clip in self.spoken])
        self.things = sorted({*(label.choice for label in self.labels.values()), *INSTRUMENTS, *nouns()})
        self.count = 0

    def ask(self, kind: str) -> str:
        """A wording of a question."""
        return self.prompts.draw(kind, self.rng)

    def row(
        self, kind: str, clips: list[Clip], messages: list[dict[str, Any]], **more: Any
    ) -> dict[str, Any]:
        """A finished row."""
        if self.split == "train":
            messages = surround_first(kind, messages, self.rng)
        return self._numbered(kind, clips, messages, **more)

    def _numbered(
        self, kind: str, clips: list[Clip], messages: list[dict[str, Any]], **more: Any
    ) -> dict[str, Any]:
        self.count += 1
        return conversation(f"{self.split}-{kind}-{self.count:06d}", kind, clips, messages, **more)

    def audio_first(self) -> bool:
        return self.rng.random() < 0.3

    def sound_clip(self, but: tuple[str, ...] = ()) -> Clip:
        """A clip of a random class."""
        return self.rng.choice(self.by_label[self.rng.choice(sorted(set(self.by_label) - set(but)))])

    # one clip
    def transcription(self, clip: Clip) -> dict[str, Any]:
        """The transcript of a clip, empty where nothing is said; sometimes without any question."""
        prompt: str | None = DEFAULT_PROMPT
        if self.split != "test" and self.rng.random() < 0.35:
            prompt = None if clip.text and self.rng.random() < 0.15 else self.ask("transcribe")
        if prompt and self.split != "test" and self.rng.random() < HINT_SHARE:
            prompt = with_hint(prompt, self.hints.draw(clip, self.rng))
        return self._transcribed(clip, prompt, self.split != "test" and self.rng.random() < 0.15)

    def hinted(self, clip: Clip) -> dict[str, Any]:
        """The transcript of a clip that is asked for with a hint, for a test."""
        return self._transcribed(clip, with_hint(DEFAULT_PROMPT, self.hints.draw(clip, self.rng)))

    def remarked(self, clip: Clip) -> dict[str, Any]:
        """The transcript of a clip that is asked for with a remark, for a test."""
        return self._transcribed(clip, surround_anew(DEFAULT_PROMPT, self.rng))

    def _transcribed(self, clip: Clip, prompt: str | None, audio_first: bool = False) -> dict[str, Any]:
        messages = [user(prompt, [clip], audio_first), assistant(transcription_answer(clip.original))]
        return self.row("transcription" if clip.text else "silence", [clip], messages, text=clip.text)

    def sound(self, clip: Clip) -> dict[str, Any]:
        """What a sound is, in free wording; speech is described where the question is open."""
        prompt = (
            None
            if self.split != "test" and clip.label != "speech" and self.rng.random() < 0.08
            else self.ask_about_sound(clip.label)
        )
        messages = [user(prompt, [clip], self.audio_first())]
        is_open = clip.label == "speech" and OPEN_WORDING.search(prompt or "")
        answer = self.asked.answer("describe", clip) if is_open else None
        messages.append(assistant(answer or self.sound_answer(clip.label)))
        return self.row("sound", [clip], messages, label=clip.label)

    def ask_about_sound(self, label: str) -> str:
        """A wording. Open ones ("What do you hear?"), about speech, are left to `newcomers` in training."""
        while True:
            text = self.ask("sound")
            if label != "speech" or self.split == "test" or not OPEN_WORDING.search(text):
                return text

    def sound_answer(self, label: str) -> str:
        return (
            f"This is the sound of {self.labels[label].phrase}."
            if label not in ("speech", "music")
            else (f"This is {self.labels[label].phrase}.")
        )

    def sound_choice(self, clip: Clip) -> dict[str, Any]:
        """What a sound is, as multiple choice."""
        others = [name for name in self.labels if name != clip.label and name in self.by_label]
        names = [clip.label, *self.rng.sample(others, self.rng.choice((1, 3, 3, 3, 4)))]
        options = [self.labels[name].choice for name in names]
        question = choice_question(self.ask("sound_choice"), options, self.rng)
        messages = [user(question, [clip], self.audio_first()), assistant(options[0])]
        return self.row("sound_choice", [clip], messages, label=clip.label)

    def asked_again(self, row: dict[str, Any], clip: Clip) -> dict[str, Any]:
        """The row with up to two more choices about its clip: the clip costs more than a question."""
        kind = "instrument_choice" if row["kind"].startswith("instrument") else "sound_choice"
        for _ in range(self.rng.choice((0, 1, 1, 2))):
            question, answer = getattr(self, kind)(clip)["messages"]
            self.count -= 1
            text = next(part["text"] for part in question["content"] if part["type"] == "text")
            row["messages"] += [user(text, []), answer]
        return row

    def instrument(self, clip: Clip) -> dict[str, Any]:
        """Which instrument plays, in free wording."""
        messages = [
            user(self.ask("instrument"), [clip], self.audio_first()),
            assistant(self.instrument_answer(clip)),
        ]
        return self.row("instrument", [clip], messages, label=clip.label)

    def instrument_answer(self, clip: Clip) -> str:
        return (
            "The instruments are drums."
            if clip.label == "drums"
            else f"The instrument is a {clip.label}.".replace(" a accordion", " an accordion").replace(
                " a organ", " an organ"
            )
        )

    def instrument_choice(self, clip: Clip) -> dict[str, Any]:
        """Which instrument plays, as multiple choice."""
        others = [name for name in self.instruments if name != clip.label]
        names = [clip.label, *self.rng.sample(others, min(len(others), self.rng.choice((1, 3, 3, 3, 4))))]
        question = choice_question(self.ask("instrument_choice"), names, self.rng)
        messages = [user(question, [clip], self.audio_first()), assistant(clip.label)]
        return self.row("instrument_choice", [clip], messages, label=clip.label)

    def is_speech(self) -> dict[str, Any]:
        """Speech or not: half of each."""
        yes = self.rng.random() < 0.5
        clip = self.rng.choice(self.by_label["speech"]) if yes else self.sound_clip(but=("speech",))
        answer = "Yes, someone is speaking." if yes else "No, there is no speech in this clip."
        return self.row(
            "is_speech", [clip], [user(self.ask("is_speech"), [clip], self.audio_first()), assistant(answer)]
        )

    def newcomer(self, kind: str) -> dict[str, Any]:
        """What a newcomer asks about a clip: mostly of speech."""
        while True:
            if kind == "music" and self.rng.random() < 0.5:
                groups = {**self.instruments, "music": self.by_label["music"]}
                clip = self.rng.choice(groups[self.rng.choice(sorted(groups))])
            elif self.rng.random() < OTHER_SHARE:
                clip = (
                    self.rng.choice(self.quiet)
                    if self.rng.random() < 0.1
                    else self.sound_clip(but=("speech",))
                )
            else:
                clip = self.rng.choice(self.spoken)
            pair = self.asked.pair(kind, clip)
            if pair and (not pair[1].startswith("No n") or self.rng.random() < NONE_KEPT[self.split]):
                break
        messages = [user(pair[0], [clip], self.audio_first()), assistant(pair[1])]
        return self.row("newcomer", [clip], messages, label=clip.label, asked=kind)

    # several turns
    def follow_up(self) -> dict[str, Any]:
        """Two or three turns about one clip; in training now and then about one each."""
        kinds: list[Callable[[], dict[str, Any]]] = [
            self._about_sound,
            self._about_speech,
            self._about_instrument,
            self._about_words,
            self.another,
        ]
        return self.rng.choices(kinds, (5, 3, 2, *((6, 4) if self.split == "train" else (0, 0))))[0]()

    def _about_sound(self) -> dict[str, Any]:
        clip = self.sound_clip(but=("speech",))
        first = self.sound(clip) if self.rng.random() < 0.5 else self.sound_choice(clip)
        self.count -= 1
        turns = [[user(self.ask("why"), []), assistant(self.labels[clip.label].reason)]]
        turns.append([user(self.ask("is_speech"), []), assistant("No, there is no speech in this clip.")])
        if self.rng.random() < 0.4:
            turns.append([user(DEFAULT_PROMPT, []), assistant(transcription_answer(""))])
        if clip.label == "music":
            question = self.rng.choice(MUSIC_QUESTIONS)
            turns.append([user(question, []), assistant(NO_DETAIL.format(what="music"))])
        self.rng.shuffle(turns)
        chosen = [message for turn in turns[: self.rng.choice((1, 1, 2))] for message in turn]
        return self.row("follow_up", [clip], first["messages"] + chosen, label=clip.label)

    def _about_speech(self) -> dict[str, Any]:
        clip = self.rng.choice(self.by_label["speech"])
        transcript = (DEFAULT_PROMPT, transcription_answer(clip.original))
        kind = (self.ask_about_sound("speech"), self.sound_answer("speech"))
        why = (self.ask("why"), self.labels["speech"].reason)
        check = (self.ask("is_speech"), "Yes, someone is speaking.")
        pairs = self.rng.choice(
            ([transcript, kind], [transcript, check], [kind, why], [kind, transcript], [check, transcript])
        )
        return self._spoken_of(clip, pairs)

    def _about_words(self) -> dict[str, Any]:
        """Of all speech, for training: newcomers' questions in front of a transcript, or behind one."""
        clip = self.rng.choice(self.spoken)
        asked = [self.asked.pair(kind, clip) for kind in self.rng.sample(NEWCOMERS_KINDS, 2)]
        pairs = [pair for pair in asked if pair][: self.rng.choice((1, 1, 2))]
        question = DEFAULT_PROMPT if self.rng.random() < 0.5 else self.ask("transcribe")
        place = len(pairs) if self.rng.random() < 0.7 else 0
        pairs.insert(place, (question, transcription_answer(clip.original)))
        return self._spoken_of(clip, pairs)

    def _spoken_of(self, clip: Clip, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        """A row of questions and answers about a clip of speech."""
        messages = [part for question, answer in pairs for part in (user(question, []), assistant(answer))]
        messages[0] = user(pairs[0][0], [clip], self.audio_first())
        return self.row("follow_up", [clip], messages, label="speech", text=clip.text)

    def _about_instrument(self) -> dict[str, Any]:
        clip = self.rng.choice(self.instruments[self.rng.choice(sorted(self.instruments))])
        messages = self.instrument(clip)["messages"]
        self.count -= 1
        if self.rng.random() < 0.5:
            messages += [user(self.ask("is_speech"), []), assistant("No, there is no speech in this clip.")]
        else:
            messages += [
                user(self.ask("why"), []),
                assistant(f"I hear the typical sound of the {clip.label}."),
            ]
        return self.row("follow_up", [clip], messages, label=clip.label)

    def another(self) -> dict[str, Any]:
        """A question about a clip, or about none, and then one about another clip."""
        speech, played = self.by_label["speech"], self.instruments
        ask: list[Callable[[], dict[str, Any]]] = [
            lambda: self.transcription(self.rng.choice(speech)),
            lambda: self.sound(self.sound_clip()),
            lambda: self.instrument(self.rng.choice(played[self.rng.choice(sorted(played))])),
            lambda: self.newcomer(self.rng.choice(NEWCOMERS_KINDS)),
            lambda: self._text(**self.rng.choice(read_table("facts.tsv"))),
        ]
        rows = [self.rng.choices(ask, (5, 4, 2, 4, last))[0]() for last in (3, 0)]
        clips = [Clip(path, row["duration_s"], "") for row in rows for path in row["audio"]]
        messages = [message for row in rows for message in row["messages"]]
        self.count -= len(rows)
        return self._numbered("follow_up", clips, messages)

    # several clips
    def compare(self) -> dict[str, Any]:
        """Two clips of different kinds: which one is X?"""
        first = self.rng.choice(self.by_label["speech"]) if self.rng.random() < 0.35 else self.sound_clip()
        second = self.sound_clip(but=(first.label,))
        clips = [first, second]
        self.rng.shuffle(clips)
        place = self.rng.randrange(2)
        if "speech" in (clips[0].label, clips[1].label) and self.rng.random() < 0.5:
            place = 0 if clips[0].label == "speech" else 1
        name = self.labels[clips[place].label].phrase
        message = user(self.ask("compare").format(label=name), clips, self.audio_first())
        answer = f"The {('first', 'second')[place]} clip is {name}."
        return self.row("compare", clips, [message, assistant(answer)], place=("first", "second")[place])

    def describe_both(self) -> dict[str, Any]:
        """Two clips: what is in each, or whether they are of one kind."""
        clips = [self.sound_clip(), self.sound_clip()]
        asked = self.rng.choice(("same", "describe_both"))
        if asked == "same" and self.rng.random() < 0.5:
            clips[1] = self.rng.choice(self.by_label[clips[0].label])
        names = [self.labels[clip.label].phrase for clip in clips]
        answer = f"The first is {names[0]} and the second is {names[1]}"
        if asked == "same":  # the verdict behind what it follows from
            answer += f", so they are {'the same' if names[0] == names[1] else 'different'}"
        message = user(self.ask(asked), clips, self.audio_first())
        return self.row("describe_both", clips, [message, assistant(answer + ".")])

    def longer(self) -> dict[str, Any]:
        """Two clips, one clearly longer."""
        while True:
            clips = [self.sound_clip(), self.sound_clip()]
            short, long = sorted(clip.duration_s for clip in clips)
            if long > 1.6 * short:
                break
        place = 0 if clips[0].duration_s > clips[1].duration_s else 1
        message = user(self.ask("longer"), clips, self.audio_first())
        return self.row(
            "longer", clips, [message, assistant(f"The {('first', 'second')[place]} clip is longer.")]
        )

    def count_clips(self) -> dict[str, Any]:
        """How many clips there are: one to three."""
        clips = [self.sound_clip() for _ in range(self.rng.randint(1, 3))]
        words = {1: "There is one clip.", 2: "There are two clips.", 3: "There are three clips."}
        message = user(self.ask("count"), clips, self.audio_first())
        return self.row("count", clips, [message, assistant(words[len(clips)])])

    # no clip
    def _text(self, question: str, answer: str) -> dict[str, Any]:
        return self.row("text", [], [user(question, []), assistant(answer)])

    def text_only(self) -> list[dict[str, Any]]:
        """Simple facts, greetings and polite refusals; the test asks for capitals in a wording of its own."""
        pairs = (
            [(row["question"], row["answer"]) for row in read_table("facts.tsv")]
            if self.split != "test"
            else []
        )
        questions = (
            CAPITAL_QUESTIONS[:1] + CAPITAL_QUESTIONS[-1:] if self.split == "test" else CAPITAL_QUESTIONS[:-1]
        )
        for row in read_table("capitals.tsv"):
            capital = f"The capital of {row['country']} is {row['capital']}."
            pairs += [(question.format(country=row["country"]), capital) for question in questions]
        return [self._text(question, answer) for question, answer in pairs]

    def options(self) -> dict[str, Any]:
        """Multiple choice over what the text says is heard: the skill of choosing an option, without a clip."""
        names = self.rng.sample(self.things, self.rng.choice((2, 4, 4, 4, 5)))
        question = choice_question(self.ask("options").format(name=names[0]), names, self.rng)
        messages = [user(question, []), assistant(names[0])]
        if self.split == "train":  # more questions about the same options are cheap
            for name in self.rng.choices(names, k=4):
                messages += [user(self.ask("options").format(name=name), []), assistant(name)]
        return self.row("options", [], messages)

    def sentences(self, texts: list[str]) -> dict[str, Any]:
        """Sentences without a clip, in the words of a transcript: they teach spelling at a tenth of the cost."""
        answer = SENTENCES_ANSWER.format(text=" ".join(texts))
        return self.row("sentences", [], [user(self.ask("sentences"), []), assistant(answer)])
