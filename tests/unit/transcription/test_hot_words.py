"""Hot words: where a phrase could stand, what the model decides, what is left alone."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioflamingo.engine.likelihood import OptionScore
from audioflamingo.errors import ArgumentError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription import hot_words
from audioflamingo.transcription.hot_words import WORTH, HotWords
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions, read_words
from audioflamingo.transcription.windows import Window
from tests.support.scripted_model import framed, tiny_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return tiny_processor(tmp_path_factory.mktemp("processor"))


def written(processor: AudioFlamingo3Processor, text: str) -> Segment:
    window = Window(0, np.zeros(16000, np.float32))
    end = processor.tokenizer.eos_token_id
    tokens = (*processor.tokenizer.encode_plain(framed(text)), end)
    return Segment(0.0, 1.0, text, tokens, logprobs=(-0.5,) * len(tokens), window=window)


def corrected(
    processor: AudioFlamingo3Processor,
    monkeypatch: pytest.MonkeyPatch,
    phrases: list[str],
    text: str,
    loss: float,
) -> Segment:
    """Each phrase costs the answer so much."""

    def score(_: Any, __: Any, ___: Any, options: list[str], adapter: Any) -> list[OptionScore]:
        return [OptionScore(o, -3.0 - loss * (o != framed(text)), 10, False) for o in options]

    monkeypatch.setattr(hot_words, "score", score)
    model: Any = None
    return HotWords(phrases, model, processor).correct(written(processor, text), None, None)


@pytest.mark.parametrize(
    ("phrases", "text", "expected"),
    [
        (["Sydney"], "We flew to Sidney.", "We flew to Sydney."),
        (["antifreeze"], "Anty free is sweet", "Antifreeze is sweet"),  # several words, and a capital
        (["Bad Tölz"], "in bat tolz, today", "in Bad Tölz, today"),
        (["earrings"], "earing. Ships", "Earrings. Ships"),
        (["earringshipping"], "earing. Ships", "earing. Ships"),  # not over the end of a sentence
        (["Sydney"], "we flew to sydney", "we flew to sydney"),  # it is there
        (["Sydney"], "we flew home", "we flew home"),  # nothing is alike
        (["Sydney"], "", ""),
        (["Sydney", "Rebecca"], "Sidney and Rebeca", "Sydney and Rebecca"),
    ],
)
def test_a_phrase_that_costs_little(
    processor: AudioFlamingo3Processor,
    monkeypatch: pytest.MonkeyPatch,
    phrases: list[str],
    text: str,
    expected: str,
) -> None:
    segment = corrected(processor, monkeypatch, phrases, text, WORTH - 0.1)
    assert segment.text == expected
    assert segment.flags == (("hot_words",) if expected != text else ())
    if expected != text:
        assert processor.decode(list(segment.tokens), skip_special_tokens=True) == framed(expected)
        assert segment.avg_logprob == pytest.approx((-3.0 - WORTH + 0.1) / 10)


def test_a_phrase_that_costs_much(
    processor: AudioFlamingo3Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert corrected(processor, monkeypatch, ["Sydney"], "to Sidney", WORTH + 0.1) == written(
        processor, "to Sidney"
    )


def test_words_of_a_file_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffKarlsruhe\n\n# towns\n  Bad Tölz \n", encoding="utf-8")
    assert read_words(str(file)) == ["Karlsruhe", "Bad Tölz"]
    assert read_words("Karlsruhe, Bad Tölz,") == ["Karlsruhe", "Bad Tölz"]
    assert read_words("AC/DC") == ["AC/DC"]
    assert read_words("names.txt,") == ["names.txt"]
    with pytest.raises(ArgumentError, match="hot_words"):
        TranscriptionOptions(hot_words=("...",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "cannot read the hot words"),
        (b"a\0b\n", "no text"),
        (b"", "holds none"),
        (b"# towns\n\n", "holds none"),
        (None, "no file of hot words"),
    ],
)
def test_files_that_hold_no_words(tmp_path: Path, content: bytes | None, message: str) -> None:
    """The name of a file that was not there became a hot word."""
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        read_words(str(file))
    with pytest.raises(ArgumentError, match="cannot read"):
        read_words(str(tmp_path))


def test_thousands_of_phrases_and_one_longer_than_a_window(processor: AudioFlamingo3Processor) -> None:
    """The right one is found among them; only a few are compared letter by letter."""
    model: Any = None
    rng = random.Random(0)
    phrases = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 14))) for _ in range(10_000)]
    words = HotWords([*phrases, "Karlsruhe", "word " * 20_000], model, processor)
    (best, *_) = words.places("we drove to Karlsruhr, in the rain")
    assert (best.start, best.end, best.phrase) == (12, 21, "Karlsruhe")
