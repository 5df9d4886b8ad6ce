"""Thoughts and answers apart: closed, not closed, twice, absent; whole and as they come; never in a transcript."""

from __future__ import annotations

import pytest

from audioflamingo.processor.conversation import strip_framing
from audioflamingo.processor.thoughts import ThoughtSplitter, ends_in_thoughts, split_pieces, split_thoughts

CASES = {
    "closed": ("<think>\nA dog barks.\n</think>\n\nA dog.", ("A dog barks.", "A dog.")),
    "not closed": ("<think>A dog barks, and then", ("A dog barks, and then", "")),
    "absent": (" No thoughts < here >.\n", (None, " No thoughts < here >.\n")),
    "begun in the prompt": ("A dog barks.</think>A dog.", ("A dog barks.", "A dog.")),
    "twice": ("<think>one</think><think>two</think>three", ("one\ntwo", "three")),
    "empty": ("<think>\n\n</think>\n\nYes.", ("", "Yes.")),
    "nothing": ("", (None, "")),
    "a lonely bracket": ("a <thin b", (None, "a <thin b")),
    "only thoughts": ("<think>hm</think>", ("hm", "")),
}


@pytest.mark.parametrize("case", CASES)
def test_whole(case: str) -> None:
    text, expected = CASES[case]
    assert split_thoughts(text) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("case", [case for case in CASES if case != "begun in the prompt"])
def test_piece_by_piece(case: str, size: int) -> None:
    text, (thoughts, answer) = CASES[case]
    pieces = list(split_pieces(text[start : start + size] for start in range(0, len(text), size)))
    check_pieces(pieces, case, thoughts, answer)


def check_pieces(pieces: list[tuple[bool, str]], case: str, thoughts: str | None, answer: str) -> None:
    joined = [
        "".join(piece for is_thinking, piece in pieces if is_thinking is wanted) for wanted in (True, False)
    ]
    assert joined == [(thoughts or "").replace("\n", "") if case == "twice" else thoughts or "", answer]
    assert not any("<think>" in piece or "</think>" in piece for _, piece in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog barks.\n</think>\n\nA dog.", ("A dog barks.", "A dog.")),
        ("A dog barks, and then", ("A dog barks, and then", "")),
        ("</think>Yes.", ("", "Yes.")),
    ],
)
def test_begun_in_the_prompt(text: str, expected: tuple[str, str], size: int) -> None:
    """A prompt that ends in `<think>`: what follows is thoughts until they are closed, at once or as it comes."""
    assert split_thoughts(text, is_thinking=True) == expected
    splitter = ThoughtSplitter(is_thinking=True)
    pieces = [p for start in range(0, len(text), size) for p in splitter.put(text[start : start + size])]
    check_pieces([*pieces, *splitter.end()], "begun", *expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\nA dog", True),
        ("<|im_start|>assistant\n<think>A dog</think>It", False),
        ("", False),
    ],
)
def test_whether_a_prompt_ends_in_thoughts(prompt: str, expected: bool) -> None:
    assert ends_in_thoughts(prompt) is expected


def test_what_is_certain_comes_at_once() -> None:
    splitter = ThoughtSplitter()
    assert splitter.put("A cat") == [(False, "A cat")]
    assert splitter.put(" sat <th") == [(False, " sat")]
    assert splitter.put("en> on") == [(False, " <then> on")]
    assert splitter.end() == []


def test_a_transcript_has_no_thoughts() -> None:
    said = '<think>They say hello.</think>\nThe spoken content of the audio is "hello".'
    assert strip_framing(said) == "hello"
    assert strip_framing("<think>They say") == ""
