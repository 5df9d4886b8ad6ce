"""Remarks around questions, in the built-in model's data."""

from __future__ import annotations

import random

from recipes.nano.nano_data import conversations, messages, surroundings

QUESTION = "What is this sound?"
REMARKS = (*surroundings.BEHIND, *surroundings.BEFORE)
NEW_REMARKS = (*surroundings.NEW_BEHIND, *surroundings.NEW_BEFORE)


def make_maker(split: str) -> conversations.Maker:
    clips = [messages.Clip(f"{n}.flac", 2.0, "rain") for n in range(3)]
    return conversations.Maker(split, {"rain": clips, "water": clips}, {}, [], "seed")


def test_a_fifth_of_questions_is_surrounded_and_stays_whole() -> None:
    drawn = [surroundings.surround(QUESTION, random.Random(n)) for n in range(3000)]
    assert 0.15 < sum(text != QUESTION for text in drawn) / 3000 < 0.25
    assert all(QUESTION.lower() in text.lower() for text in drawn)
    assert QUESTION.upper() in drawn
    assert f"{QUESTION} Answer in JSON." in drawn
    assert f"Task: {QUESTION}" in drawn


def test_no_remark_turns_a_question_into_an_open_one() -> None:
    for remark in REMARKS + NEW_REMARKS:
        assert not conversations.OPEN_WORDING.search(remark), remark


def test_only_training_has_them_and_only_around_the_first_question() -> None:
    clip = messages.Clip("a.flac", 2.0, "rain")
    for split in ("train", "valid", "test"):
        maker = make_maker(split)
        rows = [maker.sound(clip) for _ in range(200)]
        asked = ["".join(p.get("text", "") for p in row["messages"][0]["content"]) for row in rows]
        assert any(remark in text for text in asked for remark in REMARKS) == (split == "train")
    turns = [messages.user("A?", [clip]), messages.assistant("B."), messages.user("C?", [])]
    changed = surroundings.surround_first("follow_up", turns, random.Random(5))
    assert changed[1:] == turns[1:]
    assert turns[0] == messages.user("A?", [clip])


def test_questions_with_options_stay_as_they_are() -> None:
    turns = [messages.user("Which? (A) rain (B) wind", []), messages.assistant("rain")]
    assert all(
        surroundings.surround_first("sound_choice", turns, random.Random(n)) == turns for n in range(50)
    )


def test_the_test_of_remarks_has_a_new_one_in_every_row() -> None:
    assert not {*REMARKS} & {*NEW_REMARKS}
    clip = messages.Clip("a.flac", 2.0, "speech", "it rains", "It rains.")
    maker = make_maker("test")
    for _ in range(20):
        row = maker.remarked(clip)
        asked = row["messages"][0]["content"][0]["text"]
        assert asked.replace(messages.DEFAULT_PROMPT, "").strip() in NEW_REMARKS
        assert row["messages"][1]["content"][0]["text"] == messages.transcription_answer("It rains.")
