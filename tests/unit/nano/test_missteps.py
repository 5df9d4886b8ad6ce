"""Transcripts behind wrong words: labels that lead to the fewest errors, in the places of what was said."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.datasets.conversations import DataRow
from audioflamingo.training.batches import Batch
from recipes.nano.nano_model.training import missteps
from recipes.nano.nano_model.training.forward import FastModel
from recipes.nano.nano_model.training.missteps import (
    REPEATS,
    Marks,
    completions,
    labels_behind,
    stutter,
    with_own_words,
)
from recipes.nano.nano_model.vocabulary import CLOSE, QUOTE, TURN_END

CLOSING, ENDING = 90, 91
RIGHT = [1, 2, 3, 4, CLOSING, ENDING]


@pytest.mark.parametrize(
    ("said", "labels"),
    [
        pytest.param([1, 2, 3, 4, CLOSING], RIGHT, id="all right"),
        pytest.param([1, 7, 3], [1, 2, 3, 4], id="another word"),
        pytest.param([1, 3, 4], [1, 2, 4, CLOSING], id="a word left out"),
        pytest.param([1, 7, 2, 3], [1, 2, 3, 3, 4], id="a word too many, once the next is there"),
        pytest.param([1, 7, 7, 7, 7, 7, 7], [1, 2, 3, 3, 3, 3, 3, 3], id="a word again and again"),
        pytest.param([1, 2, 2, 2, 3], [1, 2, 3, 3, 3, 4], id="a right one again"),
        pytest.param([], [1], id="nothing yet"),
    ],
)
def test_the_best_next_token(said, labels):
    assert completions(said, RIGHT) == labels


def test_what_is_said_twice_may_be_right():
    assert completions([5, 5, 5], [5, 5, 5, CLOSING, ENDING]) == [5, 5, 5, CLOSING]


def test_an_early_end_is_no_end_and_nothing_is_taught_behind_it():
    marks = Marks(80, CLOSING, ENDING)
    assert labels_behind([1, CLOSING, 9], RIGHT, marks) == [1, 2, -100, -100]
    assert labels_behind(RIGHT[:-1], RIGHT, marks) == RIGHT


def test_a_stutter_says_one_token_again():
    rng = np.random.default_rng(0)
    for _ in range(50):
        heard = stutter([1, 7, 3], RIGHT, rng)
        place = next(n for n in range(3) if heard[n + 1] == heard[n])
        more = len(heard) - 3
        assert 1 <= more <= REPEATS
        assert heard == [1, 7, 3][:place] + [[1, 7, 3][place]] * (more + 1) + [1, 7, 3][place + 1 :]


def marks_of(processor: Any) -> Marks:
    """The tokens of the built-in model."""
    return Marks(*processor.tokenizer.convert_tokens_to_ids([QUOTE, CLOSE, TURN_END]))


def rows_and_batch(nano: tuple[Any, Any]) -> tuple[list[DataRow], Batch]:
    """A question about no clip, and three transcripts of noise, one of them a second turn."""
    model, processor = nano
    text = lambda role, words: {"role": role, "content": [{"type": "text", "text": words}]}  # noqa: E731
    reply = lambda words: text("assistant", f'The spoken content of the audio is "{words}.".')  # noqa: E731
    rng = np.random.default_rng(0)
    conversations: list[list[dict[str, Any]]] = [
        [text("user", "What is two and two?"), text("assistant", "Two and two is four.")]
    ]
    for seconds, turns in ((1, 1), (3, 2), (2, 1)):
        clip = {"type": "audio", "audio": rng.standard_normal(16000 * seconds).astype(np.float32) / 10}
        asked = text("user", "Transcribe it.")
        asked["content"].append(clip)
        again = [reply("Hi there"), text("user", "Once more, please.")] * (turns - 1)
        conversations.append([asked, *again, reply("Hi there, it is you")])
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, output_labels="assistant", padding_side="right"
    )
    with torch.no_grad():
        heard = model.model.audio_tower(inputs["input_features"], inputs["input_features_mask"]).audio_tokens
    rows = [
        DataRow(str(n), turns, ("clip",) if n else (), 1.0, str(n)) for n, turns in enumerate(conversations)
    ]
    return rows, Batch(
        [], 6.0, inputs["input_ids"], inputs["attention_mask"], inputs["labels"],
        answer_weights=torch.ones(4), audio_rows=heard,
    )  # fmt: skip


def test_transcripts_of_a_batch_go_on_behind_the_models_own_words(nano, monkeypatch):
    monkeypatch.setattr(missteps, "STUTTERS", 0.0)
    model, processor = nano
    rows, batch = rows_and_batch(nano)
    marks = marks_of(processor)
    fast = FastModel(model)
    found, changed = with_own_words(fast, batch, rows, marks, np.random.default_rng(0))
    assert changed == {1, 2, 3}
    old, width = batch.input_ids.shape[1], found.input_ids.shape[1]
    assert torch.equal(found.input_ids[0, :old], batch.input_ids[0])
    assert torch.equal(found.labels[0, :old], batch.labels[0])
    assert found.attention_mask[0].sum() == batch.attention_mask[0].sum()
    for row in changed:
        start = int((batch.labels[row] == marks.quote).nonzero()[-1]) + 1
        right = [label for label in batch.labels[row, start:].tolist() if label != -100]
        length = int(found.attention_mask[row].sum())
        said = found.input_ids[row, start : length - 1].tolist()
        assert torch.equal(found.input_ids[row, :start], batch.input_ids[row, :start])
        assert torch.equal(found.labels[row, :start], batch.labels[row, :start])
        assert found.labels[row, start:length].tolist() == labels_behind(said, right, marks)
        assert (found.labels[row, length:] == -100).all()
        assert said != right[:-1]
    assert width >= old
    with torch.no_grad():
        logits, *_ = fast.logits(found)
        before, *_ = fast.logits(batch)
    assert torch.isfinite(logits).all()
    first = int((batch.labels[0] != -100).sum())  # the row without a clip is the first
    torch.testing.assert_close(logits[:first], before[:first], rtol=1e-4, atol=1e-3)


def test_the_models_own_words_are_those_it_says_when_asked_alone(nano, monkeypatch):
    """A row's audio stays its own when only some rows of a batch speak."""
    monkeypatch.setattr(missteps, "STUTTERS", 0.0)
    model, processor = nano
    rows, batch = rows_and_batch(nano)
    marks = marks_of(processor)
    together, _ = with_own_words(FastModel(model), batch, rows, marks, np.random.default_rng(0))
    audio_token = model.config.audio_token_id
    alone = dataclasses.replace(
        batch,
        input_ids=batch.input_ids[3:], attention_mask=batch.attention_mask[3:], labels=batch.labels[3:],
        audio_rows=batch.audio_rows[-int((batch.input_ids[3] == audio_token).sum()) :],
    )  # fmt: skip
    found, _ = with_own_words(FastModel(model), alone, rows[3:], marks, np.random.default_rng(0))
    length = int(found.attention_mask.sum())
    assert found.input_ids[0, :length].tolist() == together.input_ids[3, :length].tolist()


def test_a_batch_that_quotes_no_words_stays_as_it_is(nano):
    model, processor = nano
    _, batch = rows_and_batch(nano)
    marks = marks_of(processor)
    asked, reply = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is rain."}
    rows = [DataRow(str(n), [asked, reply], ("clip",), 1.0, str(n)) for n in range(4)]
    found, changed = with_own_words(FastModel(model), batch, rows, marks, np.random.default_rng(0))
    assert found is batch
    assert not changed
