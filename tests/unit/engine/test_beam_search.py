"""Beam search: the search of one prompt against an exhaustive one, and what a batch must not change.

That ids and scores equal transformers' is checked in `tests/parity/test_generation_parity.py`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.engine.beam_search import BeamOptions, BeamSearch, Candidate
from audioflamingo.engine.sampling import TokenLogprob, row_seed
from audioflamingo.engine.stopping import StopRules
from audioflamingo.errors import AudioFlamingoError
from tests.support.generation_models import PieceTokenizer, ScriptedModel, random_script, says

EOS = [1, 2]
PAD = 3
PROMPTS = torch.tensor([[10], [11], [12]])


def search(model: ScriptedModel, prompts: torch.Tensor = PROMPTS, **options: Any) -> Any:
    defaults = {"max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": PAD, "num_beams": 3}
    return model.generate(prompts, **{**defaults, **options}, return_dict_in_generate=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_answer_of_all(length_penalty) -> None:
    """With as many beams as there are answers of 3 tokens nothing is pruned, so the search is exhaustive."""
    vocab_size, eos, length = 4, 1, 3
    script = random_script(vocab_size)
    model = ScriptedModel(script, vocab_size)
    output = search(
        model,
        torch.tensor([[3]]),
        max_new_tokens=length,
        eos_token_id=eos,
        pad_token_id=0,
        num_beams=27,
        num_return_sequences=5,
        length_penalty=length_penalty,
        early_stopping="never",
    )
    scores = {}
    for tokens in itertools.product(range(vocab_size), repeat=length):
        end = tokens.index(eos) + 1 if eos in tokens else length
        answer = tokens[:end]
        total = sum(script([3, *answer[:i]]).log_softmax(0)[token].item() for i, token in enumerate(answer))
        scores[answer] = total / end**length_penalty
    best = sorted(scores.items(), key=lambda item: -item[1])[:5]
    for row, (answer, score) in enumerate(best):
        assert tuple(output.sequences[row, 1 : 1 + len(answer)].tolist()) == answer
        assert output.sequences_scores[row].item() == pytest.approx(score, abs=1e-4)
        assert output.num_new_tokens[row] == len(answer)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(
    "options", [{}, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 2}]
)
def test_the_neighbours_do_not_matter(early_stopping, options) -> None:
    """Prompts are done at different steps and leave the batch; each has the answers that it has alone."""
    options = {**options, "early_stopping": early_stopping, "num_return_sequences": 2, "max_new_tokens": 12}
    prompts = torch.arange(10, 18)[:, None]
    model = ScriptedModel(random_script())
    together = search(model, prompts, **options)
    assert model.num_rows[0] == 8
    assert model.num_rows[1] == 24
    if early_stopping is True:
        assert model.num_rows[-1] < 24
    for row in range(8):
        alone = search(ScriptedModel(random_script()), prompts[row : row + 1], **options)
        width = alone.sequences.shape[1]
        assert torch.equal(together.sequences[2 * row : 2 * row + 2, :width], alone.sequences)
        assert together.sequences[2 * row : 2 * row + 2, width:].eq(PAD).all()
        assert torch.equal(together.sequences_scores[2 * row : 2 * row + 2], alone.sequences_scores)


def test_beam_sampling_repeats_with_its_seed() -> None:
    options = {"do_sample": True, "top_k": 8, "temperature": 2.0}
    together = search(ScriptedModel(random_script()), **options, seed=4)
    for row in range(3):
        alone = search(
            ScriptedModel(random_script()), PROMPTS[row : row + 1], **options, seed=[row_seed(4, row)]
        )
        width = alone.sequences.shape[1]
        assert torch.equal(together.sequences[row : row + 1, :width], alone.sequences)
    other = search(ScriptedModel(random_script()), **options, seed=5)
    assert together.sequences.tolist() != other.sequences.tolist()


def test_what_is_reported_fits_together() -> None:
    """Scores along `beam_indices` add up to the answer's score; logits and logprobs are the script's."""
    script = random_script()
    output = search(
        ScriptedModel(script),
        num_return_sequences=2,
        repetition_penalty=1.5,
        length_penalty=0.7,
        output_scores=True,
        output_logits=True,
        output_logprobs=True,
    )
    for row, count in enumerate(output.num_new_tokens):
        tokens = output.sequences[row].tolist()
        total = 0.0
        for step in range(count):
            token, beam = tokens[1 + step], output.beam_indices[row, step]
            total += output.scores[step][beam, token].item()
            expected = script(tokens[: 1 + step])
            torch.testing.assert_close(output.logits[step][beam], expected)
            assert output.logprobs[row, step].item() == pytest.approx(
                expected.log_softmax(0)[token].item(), abs=1e-5
            )
        assert output.sequences_scores[row].item() == pytest.approx(total / count**0.7, abs=1e-5)
        assert output.beam_indices[row, count:].eq(-1).all()
        assert output.logprobs[row, count:].eq(0).all()


def test_finish_reasons() -> None:
    output = search(
        ScriptedModel(says([5, 6, 1], [5, 6, 7, 8, 9, 10])), torch.tensor([[0], [1]]), max_new_tokens=4
    )
    assert output.sequences.tolist() == [[0, 5, 6, 1, PAD], [1, 5, 6, 7, 8]]
    assert output.finish_reasons == ["stop", "length"]


def test_stop_strings_end_a_beam() -> None:
    tokenizer = PieceTokenizer(*"abcdefgh")
    model = ScriptedModel(says([4, 5, 6, 7], vocab_size=8), 8)
    output = search(model, torch.tensor([[0]]), eos_token_id=[], stop_strings="ef", tokenizer=tokenizer)
    assert output.sequences.tolist() == [[0, 4, 5]]
    assert output.finish_reasons == ["stop"]


def test_too_few_answers_is_an_error() -> None:
    model = ScriptedModel(lambda tokens: torch.tensor([0.0, 0.0, -math.inf, -math.inf]), 4)
    with pytest.raises(AudioFlamingoError, match=r"prompt 0: .* found 2 of 3 answers"):
        search(
            model,
            torch.tensor([[3]]),
            max_new_tokens=1,
            num_return_sequences=3,
            eos_token_id=[],
            pad_token_id=0,
        )


class TestBeamSearch:
    """One prompt, two beams, candidates given by hand; token 1 ends an answer."""

    def state(
        self, early_stopping: Any = False, length_penalty: float = 1.0, max_new_tokens: int = 9
    ) -> BeamSearch:
        options = BeamOptions(2, 2, length_penalty, early_stopping, False, 4)
        return BeamSearch(options, max_new_tokens, StopRules(frozenset({1})))

    def advance(self, state: BeamSearch, *candidates: tuple[float, int, int]) -> None:
        state.advance(
            [
                Candidate(np.float32(score), beam, TokenLogprob(token, score))
                for score, beam, token in candidates
            ]
        )

    def test_only_the_best_candidates_may_end(self) -> None:
        """An EOS behind the first N candidates is a spare, not an answer."""
        state = self.state()
        self.advance(state, (-1.0, 0, 5), (-1.5, 0, 6), (-2.0, 0, 1), (-3.0, 0, 7))
        assert state.answers == []
        assert [beam.token_ids for beam in state.running] == [[5], [6]]

    def test_a_beam_that_ended_makes_room_for_a_spare(self) -> None:
        state = self.state()
        self.advance(state, (-1.0, 0, 1), (-1.5, 0, 6), (-2.0, 0, 5), (-3.0, 0, 7))
        assert [(beam.token_ids, beam.score) for beam in state.answers] == [([1], -1.0)]
        assert [beam.token_ids for beam in state.running] == [[6], [5]]
        self.advance(state, (-2.0, 1, 8), (-2.1, 0, 9), (-4.0, 0, 7), (-5.0, 1, 7))
        assert [beam.token_ids for beam in state.running] == [[5, 8], [6, 9]]
        assert [beam.origins for beam in state.running] == [[0, 1], [0, 0]]

    @pytest.mark.parametrize(("early_stopping", "is_done"), [(True, True), (False, False), ("never", False)])
    def test_when_to_stop(self, early_stopping, is_done) -> None:
        """Two answers of -1 and -1.5; the best running beam stands at -1.2 after one token."""
        state = self.state(early_stopping)
        self.advance(state, (-1.0, 0, 1), (-1.5, 0, 1), (-1.2, 0, 5), (-3.0, 0, 7))
        assert len(state.answers) == 2
        assert state.is_done is is_done

    @pytest.mark.parametrize(("early_stopping", "is_done"), [(False, True), ("never", False)])
    def test_never_reckons_with_the_longest_answer(self, early_stopping, is_done) -> None:
        """A beam at -2 is worse than both answers now, but could come to -2 / 9."""
        state = self.state(early_stopping)
        self.advance(state, (-1.0, 0, 1), (-1.5, 0, 1), (-2.0, 0, 5), (-3.0, 0, 7))
        assert state.is_done is is_done

    def test_the_last_step_ends_every_beam(self) -> None:
        state = self.state(max_new_tokens=1)
        self.advance(state, (-1.0, 0, 5), (-1.5, 0, 1), (-2.0, 0, 6), (-3.0, 0, 7))
        assert state.is_done
        assert [(beam.token_ids, beam.is_stopped) for beam in state.answers] == [([5], False), ([1], True)]
