"""Greedy decoding, sampling and beam search beside transformers', with the same weights and random numbers.

Ids must be equal, scores within float32 rounding. transformers draws with `torch.multinomial`; these tests
put the package's own draw in its place, so that both draw the same.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from audioflamingo.engine.sampling import Uniforms, draw, draw_without_replacement
from tests.support.generation_models import MANY_EOS, lively_model, lively_reference
from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch

PAD = 7
SEEDS = range(3)
ROWS = [([50], 5), ([3000, 40], 9), ([3], 30), ([], 12)]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Any, Any]]:
    return [(lively_model(seed), lively_reference(seed)) for seed in SEEDS]


def audio_batch() -> dict[str, torch.Tensor]:
    """Clips of one and two windows and unequal texts, padded on the left as the reference needs it."""
    return make_batch(ROWS[:2])


def text_batch(seed: int, num_rows: int, equal_lengths: bool) -> dict[str, torch.Tensor]:
    generator = random.Random(seed)
    lengths = [4] * num_rows if equal_lengths else [generator.randint(1, 9) for _ in range(num_rows)]
    return make_batch([([], length) for length in lengths], seed=seed)


def reference_answer(theirs: Any, batch: dict[str, torch.Tensor], seed: int, options: dict[str, Any]) -> Any:
    num_beams = options.get("num_beams", 1)
    num_rows = len(batch["input_ids"]) * (1 if num_beams > 1 else options.get("num_return_sequences", 1))
    uniforms = Uniforms(num_rows, seed)

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        numbers = uniforms.draw(range(num_rows), num_samples)
        if num_samples == 1:
            return draw(probabilities, numbers[:, 0])[:, None]
        return draw_without_replacement(probabilities.log(), numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        return theirs.generate(
            **batch, **options, return_dict_in_generate=True, output_scores=True, output_logits=True
        )


def assert_same(pair: tuple[Any, Any], batch: dict[str, torch.Tensor], **options: Any) -> Any:
    ours, theirs = pair
    options = {"max_new_tokens": 10, "pad_token_id": PAD, "eos_token_id": MANY_EOS, **options}
    expected = reference_answer(theirs, batch, 3, options)
    seed = {"seed": 3} if options.get("do_sample") else {}
    got = ours.generate(
        **batch, **options, **seed, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert got.sequences.tolist() == expected.sequences.tolist(), options
    if options.get("num_beams", 1) > 1:
        torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
        assert got.beam_indices.tolist() == expected.beam_indices.tolist()
    assert len(got.scores) == len(got.logits)
    for kind in ("scores", "logits"):  # at the edge of top-p a rounding decides, so -inf is not compared
        for mine, reference in zip(getattr(got, kind), getattr(expected, kind), strict=False):
            finite = mine.isfinite() & reference.isfinite()
            torch.testing.assert_close(mine[finite], reference[finite], atol=5e-3, rtol=1e-3)
    return got


SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02}
RULES = {"repetition_penalty": 1.3, "min_new_tokens": 4}
BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        RULES,
        SAMPLING,
        {**SAMPLING, **RULES, "num_return_sequences": 2},
        BEAMS,
        {**BEAMS, **RULES, "early_stopping": True},
        {**BEAMS, **SAMPLING, "early_stopping": "never", "eos_token_id": list(range(20, 30))},
    ],
    ids=["greedy", "rules", "sampling", "sampling-rules", "beams", "beams-rules", "beam-sampling"],
)
def test_audio_and_left_padding(pairs, options) -> None:
    assert_same(pairs[len(options) % 3], audio_batch(), **options)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beam_search(pairs, num_beams, length_penalty, early_stopping) -> None:
    seed = int(2 * length_penalty + num_beams) % 3
    assert_same(
        pairs[seed],
        text_batch(seed, 3, equal_lengths=False),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )


@pytest.mark.parametrize("seed", range(30))
def test_options_at_random(pairs, seed) -> None:
    """Every option with every other. n-grams only without padding, which the reference takes for text."""
    dice = random.Random(seed)
    options: dict[str, Any] = {
        "max_new_tokens": dice.randint(1, 12),
        "eos_token_id": dice.choice([None, 20, [20, 21], MANY_EOS]),
        "do_sample": dice.random() < 0.4,
        "repetition_penalty": dice.choice([1.0, 1.0, 1.3, 0.8]),
        "no_repeat_ngram_size": dice.choice([0, 0, 1, 2, 3]),
    }
    options["min_new_tokens"] = dice.choice([None, dice.randint(0, options["max_new_tokens"])])
    if dice.random() < 0.6:
        options["num_beams"] = dice.choice([2, 3, 5])
        options["num_return_sequences"] = dice.randint(1, options["num_beams"])
        options["length_penalty"] = dice.choice([-1.0, 0.0, 1.0, 2.0])
        options["early_stopping"] = dice.choice([True, False, "never"])
    elif options["do_sample"]:
        options["num_return_sequences"] = dice.randint(1, 3)
    if options["do_sample"]:
        options["temperature"] = dice.choice([0.7, 1.0, 1.5])
        options["top_k"] = dice.choice([0, 20, 50])
        options["top_p"] = dice.choice([0.9, 1.0])
        options["min_p"] = dice.choice([None, 0.01])
    batch = text_batch(seed, dice.randint(1, 3), equal_lengths=options["no_repeat_ngram_size"] > 0)
    assert_same(dice.choice(pairs), batch, **options)


def test_max_length_and_min_length(pairs) -> None:
    batch = text_batch(1, 3, equal_lengths=False)
    width = batch["input_ids"].shape[1]
    assert_same(pairs[0], batch, max_new_tokens=None, max_length=width + 6, min_length=width + 3)


def test_the_streamer_is_called_alike(pairs) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.calls.append((value.device.type, value.dtype, value.tolist()))

        def end(self) -> None:
            self.calls.append("end")

    recorders = Recorder(), Recorder()
    for model, recorder in zip(pairs[0], recorders, strict=True):
        model.generate(
            **audio_batch(), max_new_tokens=8, eos_token_id=MANY_EOS, pad_token_id=PAD, streamer=recorder
        )
    assert recorders[0].calls == recorders[1].calls


def test_an_audio_token_in_the_answer_is_a_token_like_any_other() -> None:
    """Only a prompt's `<sound>` stands for audio; one that the model writes is fed back by its embedding."""
    pair = lively_model(), lively_reference()
    batch = text_batch(0, 1, equal_lengths=True)
    first = pair[0].generate(**batch, max_new_tokens=1)[0, -1]
    for model in pair:
        with torch.no_grad():
            model.lm_head.weight[AUDIO_TOKEN_ID] = model.lm_head.weight[first] * 1.5
    got = assert_same(pair, batch, eos_token_id=None)
    assert AUDIO_TOKEN_ID in got.sequences[0].tolist()


def test_answers_of_mixed_batches_are_those_of_the_reference_one_by_one(pairs) -> None:
    """The reference refuses a batch of audio and text, so it answers row by row."""
    ours, theirs = pairs[1]
    options = {"max_new_tokens": 10, "pad_token_id": PAD, "eos_token_id": MANY_EOS, "no_repeat_ngram_size": 2}
    for padding_side in ("left", "right"):
        batch = make_batch(ROWS, padding_side)
        width = batch["input_ids"].shape[1]
        got = ours.generate(**batch, **options, return_dict_in_generate=True)
        window = 0
        for row, (frames, _) in enumerate(ROWS):
            ids = batch["input_ids"][row, batch["attention_mask"][row].bool()][None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if frames:
                span = slice(window, window + len(frames))
                inputs |= {name: batch[name][span] for name in ("input_features", "input_features_mask")}
            window += len(frames)
            expected = theirs.generate(**inputs, **options)[0, ids.shape[1] :].tolist()
            assert got.sequences[row, width : width + got.num_new_tokens[row]].tolist() == expected
