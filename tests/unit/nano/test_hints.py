"""Hints behind the instruction to transcribe, in the built-in model's data."""

from __future__ import annotations

import random

import pytest

from audioflamingo.server.transcription_form import with_hint
from recipes.nano.nano_data import conversations, hints, messages

SAID = "Ask Doctor Walker about the thermometer."


def make_maker(split: str) -> conversations.Maker:
    clips = [messages.Clip(f"{n}.flac", 2.0, "speech", f"number {n}", f"Number {n}.") for n in range(5)]
    return conversations.Maker(split, {"speech": clips}, {}, [], "seed")


def asked(row: dict) -> str:
    return "".join(part.get("text", "") for part in row["messages"][0]["content"])


@pytest.mark.parametrize("said", [SAID, ""])
def test_a_hint_is_a_sentence_or_a_few_terms(said: str) -> None:
    clip = messages.Clip("a.flac", 2.0, "speech" if said else "silence", said.lower(), said)
    made = hints.Hints(["It rains."])
    drawn = [made.draw(clip, random.Random(n)) for n in range(400)]
    assert 0.3 < drawn.count("It rains.") / 400 < 0.5
    terms = [hint.split(", ") for hint in drawn if hint != "It rains."]
    assert {len(names) for names in terms} == {1, 2, 3, 4}
    own = sum(not {"Doctor", "Walker", "thermometer"}.isdisjoint(names) for names in terms)
    assert 0.35 < own / len(terms) < 0.7 if said else own < 0.1 * len(terms)
    assert hints.Hints([]).draw(clip, random.Random(1))


def test_hints_stand_where_the_server_puts_them() -> None:
    assert hints.with_hint("Transcribe this.", "Oslo, Ada") == with_hint("Transcribe this.", "Oslo, Ada")


def test_an_eighth_of_training_has_hints_and_the_answer_is_the_transcript() -> None:
    clip = messages.Clip("a.flac", 2.0, "speech", SAID.lower(), SAID)
    maker = make_maker("train")
    rows = [maker.transcription(clip) for _ in range(500)]
    assert 0.06 < sum(" Context: " in asked(row) for row in rows) / 500 < 0.18
    assert {row["messages"][1]["content"][0]["text"] for row in rows} == {messages.transcription_answer(SAID)}
    assert not any(" Context: " in asked(make_maker("test").transcription(clip)) for _ in range(50))


def test_the_test_of_hints_has_one_in_every_row() -> None:
    clip = messages.Clip("a.flac", 2.0, "speech", SAID.lower(), SAID)
    maker = make_maker("test")
    for _ in range(20):
        row = maker.hinted(clip)
        assert asked(row).startswith(f"{messages.DEFAULT_PROMPT} Context: ")
        assert row["messages"][1]["content"][0]["text"] == messages.transcription_answer(SAID)
