"""Rules on logits beside transformers' processors; the draws: their distribution and reproducibility."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as reference

from audioflamingo.engine.sampling import (
    NO_TOKEN,
    LogitsRules,
    Uniforms,
    ban_repeated_ngrams,
    ban_tokens,
    choose_tokens,
    draw,
    draw_without_replacement,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probabilities,
    pack_history,
    penalize_repetition,
    row_seed,
)


def random_case(seed: int, vocab_size: int = 23, length: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(4, V)` with ties and bans among them, and a history `(4, L)` with many repeats."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocab_size, generator=generator) * 3
    logits[:, 5] = logits[:, 7]
    logits[1, 3] = -torch.inf
    history = torch.randint(0, 6, (4, length), generator=generator)
    return logits, history


CASES = [pytest.param(*random_case(seed), id=f"seed{seed}") for seed in range(5)]


@pytest.mark.parametrize(("logits", "history"), CASES)
class TestBesideTheReference:
    @pytest.mark.parametrize("penalty", [1.3, 0.7])
    def test_repetition_penalty(self, logits, history, penalty) -> None:
        expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(history, logits)
        assert torch.equal(penalize_repetition(logits, history, penalty), expected)

    @pytest.mark.parametrize("size", [1, 2, 3, 17, 18, 30])
    def test_no_repeat_ngram(self, logits, history, size) -> None:
        expected = reference.NoRepeatNGramLogitsProcessor(size)(history, logits)
        assert torch.equal(ban_repeated_ngrams(logits, history, size), expected)

    def test_min_new_tokens(self, logits, history) -> None:
        processor = reference.MinNewTokensLengthLogitsProcessor(history.shape[1] - 2, 3, [4, 9])
        assert torch.equal(ban_tokens(logits, [4, 9]), processor(history, logits))
        rules = LogitsRules(min_new_tokens=3, eos_token_ids=(4, 9))
        assert torch.equal(rules(logits, None, 2), processor(history, logits))
        assert torch.equal(rules(logits, None, 3), logits)

    @pytest.mark.parametrize("top_k", [1, 2, 7, 23, 100])
    def test_top_k(self, logits, history, top_k) -> None:
        assert torch.equal(keep_top_k(logits, top_k), reference.TopKLogitsWarper(top_k)(history, logits))

    @pytest.mark.parametrize("min_tokens", [1, 3])
    @pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
    def test_top_p(self, logits, history, top_p, min_tokens) -> None:
        expected = reference.TopPLogitsWarper(top_p, min_tokens_to_keep=min_tokens)(history, logits)
        assert torch.equal(keep_top_p(logits, top_p, min_tokens), expected)

    @pytest.mark.parametrize("min_tokens", [1, 3])
    @pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
    def test_min_p(self, logits, history, min_p, min_tokens) -> None:
        expected = reference.MinPLogitsWarper(min_p, min_tokens_to_keep=min_tokens)(history, logits)
        assert torch.equal(keep_min_p(logits, min_p, min_tokens), expected)

    @pytest.mark.parametrize("min_tokens", [1, 3])
    def test_all_rules_in_order(self, logits, history, min_tokens) -> None:
        expected = logits
        for processor in (
            reference.RepetitionPenaltyLogitsProcessor(1.2),
            reference.NoRepeatNGramLogitsProcessor(2),
            reference.MinNewTokensLengthLogitsProcessor(history.shape[1], 1, [4, 9]),
            reference.TemperatureLogitsWarper(0.6),
            reference.TopKLogitsWarper(12, min_tokens_to_keep=min_tokens),
            reference.TopPLogitsWarper(0.8, min_tokens_to_keep=min_tokens),
            reference.MinPLogitsWarper(0.02, min_tokens_to_keep=min_tokens),
        ):
            expected = processor(history, expected)
        rules = LogitsRules(1.2, 2, 1, (4, 9), True, 0.6, 12, 0.8, 0.02, min_tokens)
        before = logits.clone()
        assert torch.equal(rules(logits, history, 0), expected)
        assert torch.equal(logits, before)


def test_rules_do_not_see_padding() -> None:
    """A row's scores are those of the row without padding, wherever the padding stands."""
    logits, history = random_case(0)
    rules = LogitsRules(repetition_penalty=1.4, no_repeat_ngram_size=2)
    for is_real in ([0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]):
        mask = torch.tensor(is_real, dtype=torch.bool)
        padded = torch.full((1, 7), 2)
        padded[0, mask] = history[0, :5]
        packed = pack_history(padded, mask[None])
        assert packed.tolist() == [[NO_TOKEN, NO_TOKEN, *history[0, :5].tolist()]]
        assert torch.equal(rules(logits[:1], packed, 0), rules(logits[:1], history[:1, :5], 0))


def test_ids_beyond_the_vocabulary_in_the_history_are_passed_over() -> None:
    logits = torch.ones(1, 4)
    history = torch.tensor([[2, 9, 2, 9, 2]])
    assert penalize_repetition(logits, history, 2.0).tolist() == [[1, 1, 0.5, 1]]
    assert torch.equal(ban_repeated_ngrams(logits, history, 2), logits)


def test_choose_tokens_marks_rows_without_a_valid_distribution() -> None:
    scores = torch.tensor([[0.0, 2, 1], [0, torch.nan, 1], [-torch.inf] * 3, [0, torch.inf, 1]])
    assert choose_tokens(scores, None).tolist() == [1, NO_TOKEN, NO_TOKEN, NO_TOKEN]
    assert choose_tokens(scores, torch.full((4,), 0.999)).tolist() == [0, NO_TOKEN, NO_TOKEN, NO_TOKEN]


def test_draw_follows_the_distribution() -> None:
    """Chi-squared with 9 degrees of freedom on 20 000 draws: passes 33.7 once in 10 000 seeds."""
    generator = torch.Generator().manual_seed(7)
    probabilities = torch.tensor([0.3, 0.02, 0.2, 0.01, 0.1, 0.07, 0.1, 0.05, 0.05, 0.1])
    count = 20_000
    tokens = draw(probabilities.expand(count, -1), torch.rand(count, generator=generator))
    expected = probabilities * count
    chi_squared = ((tokens.bincount(minlength=10) - expected) ** 2 / expected).sum().item()
    assert chi_squared < 33.7


def test_draw_never_takes_what_is_forbidden() -> None:
    """The largest uniform number that float32 gives lands on the last allowed token, not behind it."""
    probabilities = torch.rand(64, 1000, generator=torch.Generator().manual_seed(0)).softmax(1)
    probabilities[:, ::2] = 0
    for uniform in (0.0, 0.5, 1 - 2**-24):
        tokens = draw(probabilities, torch.full((64,), uniform))
        assert (probabilities.gather(1, tokens[:, None]) > 0).all()


def test_draw_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(9, 500, generator=generator).softmax(1)
    uniforms = torch.rand(9, generator=generator)
    alone = [draw(probabilities[row : row + 1], uniforms[row : row + 1]).item() for row in range(9)]
    assert draw(probabilities, uniforms).tolist() == alone


def test_draw_without_replacement_follows_the_distribution() -> None:
    """12 ordered pairs, chi-squared with 11 degrees of freedom: passes 37.4 once in 10 000 seeds."""
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 20_000
    uniforms = torch.rand(count, 2, generator=torch.Generator().manual_seed(3))
    pairs = draw_without_replacement(weights.log().expand(count, -1), uniforms)
    chi_squared = 0.0
    for first in range(4):
        for second in range(4):
            seen = ((pairs[:, 0] == first) & (pairs[:, 1] == second)).sum().item()
            if first == second:
                assert seen == 0
            else:
                expected = count * (weights[first] * weights[second] / (1 - weights[first])).item()
                chi_squared += (seen - expected) ** 2 / expected
    assert chi_squared < 37.4


def test_draw_without_replacement_when_the_weights_run_out() -> None:
    log_weights = torch.tensor([[-torch.inf, 0.0, -2e9, -1e9, -1.0]])
    drawn = draw_without_replacement(log_weights, torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.9]])).tolist()[0]
    assert sorted(drawn[:2]) == [1, 4]
    assert drawn[2:] == [3, 2, 0]


def test_uniforms_with_a_seed_are_those_of_the_row_alone() -> None:
    together = Uniforms(3, seed=11)
    numbers = torch.stack([together.draw([0, 1, 2])[:, 0] for _ in range(4)])
    for row in range(3):
        alone = Uniforms(1, seed=[row_seed(11, row)])
        assert [alone.draw([0]).item() for _ in range(4)] == numbers[:, row].tolist()
    assert len({*numbers.flatten().tolist()}) == 12
    assert row_seed(11, 0) == 11
    assert torch.equal(Uniforms(1, seed=11).draw([0], 2), Uniforms(1, seed=[11]).draw([0], 2))


def test_uniforms_of_a_generator_do_not_depend_on_who_has_finished() -> None:
    everyone = Uniforms(3, generator=torch.Generator().manual_seed(0))
    some = Uniforms(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(everyone.draw([0, 1, 2]), some.draw([0, 1, 2]))
    assert torch.equal(everyone.draw([0, 1, 2])[2:], some.draw([2]))


def test_uniforms_without_seed_follow_the_global_generator() -> None:
    torch.manual_seed(5)
    first = Uniforms(2).draw([0, 1], 3)
    torch.manual_seed(5)
    assert torch.equal(first, Uniforms(2).draw([0, 1], 3))
    assert first.shape == (2, 3)


def test_log_probabilities() -> None:
    logits = torch.tensor([[0.0, math.log(3)]])
    (entry,) = log_probabilities(logits, torch.tensor([1]), num_top=2)
    assert (entry.token_id, [token for token, _ in entry.top]) == (1, [1, 0])
    assert [entry.logprob, *(value for _, value in entry.top)] == pytest.approx(
        [math.log(0.75), math.log(0.75), math.log(0.25)]
    )


def test_frequency_and_presence_count_the_answer_alone() -> None:
    answers = torch.tensor([[NO_TOKEN, 2, 2], [0, 1, NO_TOKEN]])
    rules = LogitsRules(frequency_penalty=0.5, presence_penalty=0.25)
    got = rules(torch.zeros(2, 4), None, 3, answers)
    assert got.tolist() == [[0, 0, -1.25, 0], [-0.75, -0.75, 0, 0]]
