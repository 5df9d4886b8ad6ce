"""What stands around a question: remarks before and behind it, and capitals. None of it changes the answer."""

from __future__ import annotations

import random
from typing import Any

UPPER_SHARE = 0.05  # of questions of training
BEHIND_SHARE = 0.1
BEFORE_SHARE = 0.08
PLAIN_KINDS = {"sound_choice", "instrument_choice", "options", "sentences", "text"}  # left as they are
BEHIND = (
    "Answer in one sentence.", "Answer briefly.", "Be brief.", "Keep it short.", "Answer in English.", "Thank you.",
    "Answer in JSON.", "Use plain text.", "Give only the answer.", "Reply with one line.", "No explanations, please.",
    "Do not make anything up.", "Think step by step.", "This is important.", "If you are not sure, say so.",
    "The language is English.", "It is in English.", "The speaker speaks English.", "It was recorded with a telephone.",
    "The clip is from a film.", "It is from a meeting in London.", "The quality is poor.", "I need it for my notes.",
    "Be as exact as you can.", "Answer as an expert.", "Take your time.", "Write nothing else.", "My name is Anna.",
    "Format: plain text.", "Language: English.", "Style: short.", "Date: Monday, the third of May.",
    'The file is called "memo".', 'End with "done".', "Thanks a lot!", "Cheers.", "I could not make it out myself.",
    "It is for a list that I keep.", "My speakers are broken.", "I have no time to listen to it all.",
)  # fmt: skip
BEFORE = (
    "You are an expert in audio.", "You are a careful assistant.", "Here is a clip.", "I have a recording here.",
    "Listen carefully.", "This was recorded in a street in Paris.", "This is from my phone.", "Task:", "Instruction:",
    "User:", "Context: a call to an office.", "I am new to this.", "Be precise.", "Here comes a question.",
    "The attached file is from a friend.", "In the following, answer in English.", "Assistant:", "Hey there!",
    "I got this from a colleague and I am in a hurry.", "My ears are not what they were.", "Quick question:",
    "I am testing what you can do.", "Sorry for the poor quality, I was outside.", "First try:", "One more thing.",
    "I keep a diary in recordings, and this is for today.", "My daughter sent me this, and we cannot agree about it.",
    'This is from a tape with the label "attic".', "I am setting up a program and need to know one thing.",
    "I pressed the wrong button, so it may be short.", "We have a bet at the office.", "Okay, here it is:",
    "My player is broken.", "I have many such files and must sort them.", "You have good ears, I am told.",
)  # fmt: skip

# For tests only.
NEW_BEHIND = (
    "Reply in a single line.", "The recording comes from a phone call.", "Output as JSON, please.", "Many thanks!",
    "It is in English, by the way.", "Nothing but what I asked for.", "We speak English.", "Mind the spelling.",
    'It is on the disk "backup".',
)  # fmt: skip
NEW_BEFORE = (
    "You are a patient helper.", "I found this on an old disk.", "Job:", "From a friend in Boston:",
    "My boss needs this before noon.", 'I call this one "garden".', "Assistant, please:",
)  # fmt: skip


def surround_anew(text: str, rng: random.Random) -> str:
    """A question of a test with a remark that training lacks."""
    is_behind = rng.random() < len(NEW_BEHIND) / len((*NEW_BEHIND, *NEW_BEFORE))
    return f"{text} {rng.choice(NEW_BEHIND)}" if is_behind else f"{rng.choice(NEW_BEFORE)} {text}"


def surround(text: str, rng: random.Random) -> str:
    """A question of training as it is or, one time in five, with a remark or in capitals."""
    drawn = rng.random()
    if drawn < UPPER_SHARE:
        return text.upper()
    if drawn < UPPER_SHARE + BEHIND_SHARE:
        return f"{text} {rng.choice(BEHIND)}"
    if drawn < UPPER_SHARE + BEHIND_SHARE + BEFORE_SHARE:
        return f"{rng.choice(BEFORE)} {text}"
    return text


def surround_first(kind: str, messages: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The messages of a row of training with `surround` around the first question, where its kind allows it."""
    if kind in PLAIN_KINDS:
        return messages
    first, *others = messages
    parts = [
        {**part, "text": surround(part["text"], rng)} if part["type"] == "text" else part
        for part in first["content"]
    ]
    return [{**first, "content": parts}, *others]
