"""`generate` and `stream`: what must not change an answer, what ends it, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import types
import warnings
import weakref
from typing import Any

import pytest
import torch

import audioflamingo.engine.choosing as choosing
from audioflamingo.config import GenerationConfig
from audioflamingo.engine.generate import GenerateOutput
from audioflamingo.engine.sampling import row_seed
from audioflamingo.errors import ArgumentError, AudioFlamingoError, AudioFlamingoWarning, ContextLengthError
from audioflamingo.processor.tokenizer import Tokenizer
from tests.support.generation_models import (
    MANY_EOS,
    PieceTokenizer,
    ScriptedModel,
    lively_model,
    random_script,
    says,
)
from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch
from tests.support.tiny_tokenizer import write_tiny_processor

ROWS = [([50], 5), ([], 12), ([3000, 40], 9), ([3], 30)]
PAD = 7
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
RULES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model()


def answers(output: GenerateOutput) -> list[list[int]]:
    """The answers without prompt and padding."""
    width = len(output.sequences[0]) - max(output.num_new_tokens)
    rows = zip(output.sequences.tolist(), output.num_new_tokens, strict=True)
    return [row[width : width + count] for row, count in rows]


def run(model: Any, batch: dict[str, Any], **options: Any) -> GenerateOutput:
    eos = [] if isinstance(model, ScriptedModel) else MANY_EOS
    defaults = {"max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": PAD}
    return model.generate(**batch, **{**defaults, **options}, return_dict_in_generate=True)


class TestWhatMustNotChangeAnAnswer:
    @pytest.mark.parametrize("options", [{}, RULES, {"num_beams": 3}], ids=["greedy", "rules", "beams"])
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_the_neighbours_and_the_padding(self, model, padding_side, options) -> None:
        """P1, P2: each row of a mixed batch answers as it does alone."""
        together = run(model, make_batch(ROWS, padding_side), **options)
        alone = [run(model, row, **options) for row in rows_alone(make_batch(ROWS, padding_side))]
        assert answers(together) == [answers(output)[0] for output in alone]
        assert together.finish_reasons == [output.finish_reasons[0] for output in alone]
        assert len(set(together.num_new_tokens)) > 1, (
            "rows should end at different steps, or the test is blunt"
        )

    def test_garbage_in_the_padding(self, model) -> None:
        batch = make_batch(ROWS)
        changed = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        assert answers(run(model, batch, **RULES)) == answers(run(model, changed, **RULES))

    def test_padding_between_tokens(self, model) -> None:
        ids = torch.tensor([[11, 0, 12, 0, 0, 13]])
        spread = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        dense = {"input_ids": torch.tensor([[11, 12, 13]])}
        assert answers(run(model, spread, **RULES)) == answers(run(model, dense, **RULES))

    def test_the_neighbours_when_drawing_with_a_seed(self, model) -> None:
        together = run(model, make_batch(ROWS), **SAMPLING, seed=5)
        for row, alone in enumerate(rows_alone(make_batch(ROWS))):
            again = run(model, alone, **SAMPLING, seed=[row_seed(5, row)])
            assert answers(again) == [answers(together)[row]]

    @pytest.mark.parametrize("draw", [{}, SAMPLING | {"seed": 3}], ids=["greedy", "sampling"])
    def test_the_departure_of_finished_rows(self, draw) -> None:
        """Rows that have finished leave the batch, in a cache of the caller's too: the same answers."""
        prompts = {"input_ids": torch.arange(6)[:, None] + 10}
        options = {"eos_token_id": [1, 2, 3, 4], "max_new_tokens": 20, **draw}
        own, callers = ScriptedModel(random_script()), ScriptedModel(random_script())
        expected = run(own, prompts, **options)
        got = run(callers, prompts, **options, past_key_values=callers.new_cache(6, 100))
        assert answers(got) == answers(expected)
        for model in (own, callers):
            assert model.num_rows == [
                sum(n > step for n in expected.num_new_tokens) for step in range(len(model.num_rows))
            ]
            assert model.num_rows[-1] < 6

    def test_several_answers_are_those_of_repeated_prompts(self, model) -> None:
        batch = make_batch(ROWS[:2])
        several = run(model, batch, **SAMPLING, seed=8, num_return_sequences=3)
        for prompt, alone in enumerate(rows_alone(batch)):
            for copy in range(3):
                row = 3 * prompt + copy
                again = run(model, alone, **SAMPLING, seed=[row_seed(8, row)])
                assert answers(again) == [answers(several)[row]]

    @pytest.mark.parametrize(
        "options", [{}, SAMPLING | {"seed": 1, "num_return_sequences": 2}], ids=["greedy", "drawn"]
    )
    def test_streaming(self, model, options) -> None:
        wanted = {"output_logprobs": True, "output_scores": True, "output_logits": True}
        common = {"max_new_tokens": 12, "eos_token_id": MANY_EOS, "pad_token_id": PAD, **options, **wanted}
        batch = make_batch(ROWS)
        expected = run(model, batch, **options, **wanted)
        steps = list(model.stream(**batch, **common))
        width = batch["input_ids"].shape[1]
        assert torch.equal(torch.stack([step.token_ids for step in steps], 1), expected.sequences[:, width:])
        assert steps[-1].finish_reasons == expected.finish_reasons
        assert [
            sum(flags) for flags in zip(*(s.is_new for s in steps), strict=True)
        ] == expected.num_new_tokens
        assert torch.equal(torch.stack([step.logprobs for step in steps], 1), expected.logprobs)
        for step, scores, logits in zip(steps, expected.scores, expected.logits, strict=True):
            torch.testing.assert_close(step.scores, scores, equal_nan=True, rtol=0, atol=0)
            torch.testing.assert_close(step.logits, logits, equal_nan=True, rtol=0, atol=0)


def rows_alone(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The prompts of `make_batch(ROWS)`, or of its first rows, one by one and without padding."""
    alone, window = [], 0
    for row, (frames, _) in enumerate(ROWS[: len(batch["input_ids"])]):
        ids = batch["input_ids"][row, batch["attention_mask"][row].bool()][None]
        inputs = {"input_ids": ids}
        if frames:
            span = slice(window, window + len(frames))
            inputs |= {name: batch[name][span] for name in ("input_features", "input_features_mask")}
        window += len(frames)
        alone.append(inputs)
    return alone


class TestRandomNumbers:
    def test_a_seed_repeats_and_another_differs(self, model) -> None:
        batch = make_batch(ROWS)
        first, second, other = (answers(run(model, batch, **SAMPLING, seed=s)) for s in (1, 1, 2))
        assert first == second != other

    def test_equal_prompts_draw_differently(self) -> None:
        """Two of 4 rows of 12 tokens among 32 agree by chance in fewer than 1 of 10**9 runs."""
        model = ScriptedModel(lambda tokens: torch.zeros(32))
        output = run(
            model, {"input_ids": torch.ones(4, 1, dtype=torch.long)}, do_sample=True, eos_token_id=[], seed=0
        )
        assert len({tuple(answer) for answer in answers(output)}) == 4

    def test_an_explicit_generator(self, model) -> None:
        batch = make_batch(ROWS)
        generator = torch.Generator().manual_seed(4)
        first = answers(run(model, batch, **SAMPLING, generator=generator))
        assert answers(run(model, batch, **SAMPLING, generator=generator)) != first
        assert answers(run(model, batch, **SAMPLING, generator=generator.manual_seed(4))) == first

    def test_without_seed_the_global_generator_counts(self, model) -> None:
        batch = make_batch(ROWS)
        torch.manual_seed(9)
        first = answers(run(model, batch, **SAMPLING))
        torch.manual_seed(9)
        assert answers(run(model, batch, **SAMPLING)) == first

    def test_a_seed_leaves_the_global_generator_alone(self, model) -> None:
        torch.manual_seed(9)
        expected = torch.rand(3)
        torch.manual_seed(9)
        run(model, make_batch(ROWS[:1]), **SAMPLING, seed=1)
        assert torch.equal(torch.rand(3), expected)

    def test_tokens_follow_the_distribution(self) -> None:
        """Chi-squared with 4 degrees of freedom on 4000 first tokens: passes 23.5 once in 10 000 seeds."""
        weights = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
        model = ScriptedModel(lambda tokens: weights.log(), vocab_size=5)
        prompts = torch.zeros(4000, 1, dtype=torch.long)
        output = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=1, seed=0)
        expected = weights * 4000
        chi_squared = ((output[:, 1].bincount(minlength=5) - expected) ** 2 / expected).sum().item()
        assert chi_squared < 23.5

    def test_temperature_zero_is_greedy(self, model) -> None:
        batch = make_batch(ROWS)
        assert answers(run(model, batch, do_sample=True, temperature=0)) == answers(run(model, batch))


class TestHowAnAnswerEnds:
    def test_eos_padding_and_reasons(self) -> None:
        model = ScriptedModel(says([5, 6, 9], [5, 8], [5, 6, 7, 10]))
        output = run(model, {"input_ids": torch.arange(3)[:, None]}, eos_token_id=[8, 9], max_new_tokens=4)
        assert output.sequences.tolist() == [[0, 5, 6, 9, PAD], [1, 5, 8, PAD, PAD], [2, 5, 6, 7, 10]]
        assert output.finish_reasons == ["stop", "stop", "length"]
        assert output.num_new_tokens == [3, 2, 4]

    def test_the_first_eos_pads_when_there_is_no_padding_id(self) -> None:
        model = ScriptedModel(says([5, 9], [5, 6, 8]))
        output = run(model, {"input_ids": torch.arange(2)[:, None]}, eos_token_id=[8, 9], pad_token_id=None)
        assert output.sequences.tolist() == [[0, 5, 9, 8], [1, 5, 6, 8]]

    def test_eos_as_the_last_allowed_token_is_a_stop(self) -> None:
        model = ScriptedModel(says([5, 9]))
        assert run(
            model, {"input_ids": torch.zeros(1, 1).long()}, eos_token_id=9, max_new_tokens=2
        ).finish_reasons == ["stop"]

    @pytest.mark.parametrize("options", [{"min_new_tokens": 3}, {"min_length": 4}])
    def test_a_least_length(self, options) -> None:
        model = ScriptedModel(lambda tokens: torch.tensor([0.0, 3, 2, 1]), vocab_size=4)
        output = run(model, {"input_ids": torch.ones(1, 1).long()}, eos_token_id=1, pad_token_id=0, **options)
        assert output.sequences.tolist() == [[1, 2, 2, 2, 1]]

    def test_max_length_counts_the_prompt(self) -> None:
        model = ScriptedModel(random_script())
        assert model.generate(torch.tensor([[1, 2, 3]]), max_length=8).shape == (1, 8)
        with pytest.raises(ArgumentError, match="max_length=3 leaves no room behind the prompt's 3"):
            model.generate(torch.tensor([[1, 2, 3]]), max_length=3)

    @pytest.mark.parametrize(
        ("stop_strings", "answer", "kept"),
        [
            (["END", "never"], [3, 4, 5, 6], [3, 4]),  # from inside one token to inside the next
            (["END", "never"], [5, 6, 6, 6], [5]),  # inside one token
            (["END", "never"], [8, 9, 10, 6], None),  # in the prompt only
            (["END", "never"], [7, 8, 6, 9, 10], None),  # interrupted
            ("x END!", [7, 8, 9, 10, 6], [7, 8, 9, 10]),  # nearly a token a character
        ],
    )
    def test_stop_strings(self, stop_strings, answer, kept) -> None:
        tokenizer = PieceTokenizer("ENDEN", "EN", "", "an E", "ND of", "aENDb", " ", "x E", "N", "D", "!")
        model = ScriptedModel(says(answer, vocab_size=11), vocab_size=11)
        options = {"stop_strings": stop_strings, "tokenizer": tokenizer, "max_new_tokens": len(answer)}
        output = run(model, {"input_ids": torch.zeros(1, 1).long()}, **options)
        assert answers(output) == [kept or answer]
        assert output.finish_reasons == ["stop" if kept else "length"]

    def test_a_stop_string_ends_its_own_row_only(self) -> None:
        tokenizer = PieceTokenizer(*"abcdefgh")
        model = ScriptedModel(says([3, 4, 5], [4, 3, 5], [3, 3, 4], vocab_size=8), vocab_size=8)
        output = run(
            model,
            {"input_ids": torch.arange(3)[:, None]},
            max_new_tokens=3,
            stop_strings="de",
            tokenizer=tokenizer,
        )
        assert answers(output) == [[3, 4], [4, 3, 5], [3, 3, 4]]
        assert output.finish_reasons == ["stop", "length", "stop"]

    def test_stop_string_of_a_character_in_several_tokens(self, tokenizer) -> None:
        ids = tokenizer.encode_plain("a日b")
        assert len(ids) == 5
        model = ScriptedModel(says(ids, vocab_size=600), vocab_size=600)
        output = run(model, {"input_ids": torch.zeros(1, 1).long()}, stop_strings="日", tokenizer=tokenizer)
        assert answers(output) == [ids[:4]]

    def test_a_long_answer_decodes_a_window_only(self, tokenizer) -> None:
        seen = []

        class Recorder:
            def decode(self, token_ids, skip_special_tokens):
                seen.append(len(token_ids))
                return tokenizer.decode(token_ids, skip_special_tokens)

        model = ScriptedModel(says([65], vocab_size=600), vocab_size=600)
        run(
            model,
            {"input_ids": torch.zeros(1, 1).long()},
            stop_strings="xyz",
            tokenizer=Recorder(),
            max_new_tokens=50,
        )
        assert max(seen) <= 7

    def test_the_context_limits_the_answer_with_one_warning(self) -> None:
        model = ScriptedModel(random_script(), context=10)
        ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 5, 6, 7]])
        mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
        with pytest.warns(
            AudioFlamingoWarning, match="50 new tokens do not fit behind a prompt of 7 .* limited to 3"
        ) as w:
            output = run(
                model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=50, eos_token_id=[]
            )
        assert len(w) == 1
        assert w[0].filename == __file__
        assert output.num_new_tokens == [3, 7]
        assert output.finish_reasons == ["length", "length"]

    def test_a_prompt_that_fills_the_context_is_refused(self) -> None:
        model = ScriptedModel(random_script(), context=5)
        with pytest.raises(ContextLengthError, match="prompt has 6 tokens, the context holds 5"):
            model.generate(torch.ones(1, 6).long())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_processor(tmp_path_factory.mktemp("tokenizer")))


class TestContinuingACache:
    def test_two_parts_answer_as_the_whole(self, model) -> None:
        batch = make_batch(ROWS)
        expected = answers(run(model, batch))
        first, rest = rows_alone(batch)[2], expected[2]
        ids = first.pop("input_ids")
        cache = model.new_cache(1, 2000)
        start = ids.shape[1] - 3
        model(input_ids=ids[:, :start], **first, past_key_values=cache, use_cache=True)
        output = run(model, {"input_ids": ids[:, start:]}, past_key_values=cache)
        assert answers(output) == [rest]
        assert output.past_key_values is cache
        assert cache.lengths == [ids.shape[1] + len(rest) - 1]

    def test_rows_that_end_early_keep_their_part(self) -> None:
        model = ScriptedModel(random_script())
        cache = model.new_cache(3, 60)
        prompts = torch.tensor([[4], [5], [6]])
        output = run(model, {"input_ids": prompts}, eos_token_id=[1, 2, 3, 4], past_key_values=cache)
        assert len(set(output.num_new_tokens)) > 1
        assert cache.lengths == output.num_new_tokens
        held = [
            cache.store.keys[0][0, span.start : span.start + span.length, 0].long().tolist()
            for span in cache.spans
        ]
        assert held == [
            [prompt, *answer[:-1]] for prompt, answer in zip((4, 5, 6), answers(output), strict=True)
        ]

    def test_the_cache_limits_the_answer(self) -> None:
        model = ScriptedModel(random_script())
        with pytest.warns(AudioFlamingoWarning, match="in the cache of 6; the answer is limited to 4"):
            output = run(
                model,
                {"input_ids": torch.ones(1, 2).long()},
                eos_token_id=[],
                past_key_values=model.new_cache(1, 6),
            )
        assert output.num_new_tokens == [4]

    def test_what_is_refused(self) -> None:
        model = ScriptedModel(random_script())
        ids = torch.ones(2, 2).long()
        for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
            with pytest.raises(ArgumentError, match="continues one answer a prompt"):
                model.generate(ids, past_key_values=model.new_cache(2, 50), **options)
        with pytest.raises(ArgumentError, match="has 3 rows, input_ids 2"):
            model.generate(ids, past_key_values=model.new_cache(3, 50))
        with pytest.raises(ArgumentError, match="must be a KVCache"):
            model.generate(ids, past_key_values=((1, 2),))


class TestStreams:
    def test_a_streamer_gets_prompt_steps_and_end(self) -> None:
        class Recorder:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def put(self, value: torch.Tensor) -> None:
                self.calls.append(value.tolist())

            def end(self) -> None:
                self.calls.append("end")

        streamer = Recorder()
        model = ScriptedModel(says([5, 9], [5, 6, 9]))
        model.generate(torch.tensor([[0], [1]]), eos_token_id=9, pad_token_id=PAD, streamer=streamer)
        assert streamer.calls == [[[0], [1]], [5, 5], [9, 6], [PAD, 9], "end"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_the_streamer_ends_when_generation_breaks_off(self, error) -> None:
        class Breaks:
            num_puts = num_ends = 0

            def put(self, value: torch.Tensor) -> None:
                self.num_puts += 1
                if self.num_puts == 3:
                    raise error

            def end(self) -> None:
                self.num_ends += 1

        streamer = Breaks()
        with pytest.raises(error):
            ScriptedModel(random_script()).generate(torch.ones(1, 1).long(), streamer=streamer)
        assert streamer.num_ends == 1

    def test_closing_the_iterator_stops_and_frees_the_cache(self) -> None:
        model = ScriptedModel(random_script())
        caches = []
        original = model.packed_logits

        def packed_logits(x: torch.Tensor, view: Any, last: torch.Tensor) -> Any:
            caches.append(weakref.ref(view.store))
            return original(x, view, last)

        model.packed_logits = packed_logits
        stream = model.stream(torch.ones(1, 1).long(), max_new_tokens=100)
        next(stream)
        next(stream)
        assert caches[0]() is not None
        stream.close()
        gc.collect()
        assert caches[0]() is None
        assert len(model.num_rows) == 2

    def test_the_model_runs_when_the_iterator_is_consumed_but_values_are_checked_at_once(self) -> None:
        model = ScriptedModel(random_script())
        with pytest.raises(ArgumentError, match="top_p must be"):
            model.stream(torch.ones(1, 1).long(), top_p=3, do_sample=True)
        model.stream(torch.ones(1, 1).long())
        assert model.num_rows == []

    def test_gradients_stay_as_the_consumer_has_them(self, model) -> None:
        for _ in model.stream(torch.ones(1, 3).long(), max_new_tokens=3):
            assert torch.is_grad_enabled()

    def test_beams_are_streamed_when_the_search_ends(self, model, monkeypatch) -> None:
        """Asked for or the checkpoint's own: a followed answer is the answer of `generate`."""
        batch = make_batch(ROWS)
        width = batch["input_ids"].shape[1]
        expected = model.generate(**batch, max_new_tokens=8, num_beams=3)[:, width:]
        greedy = model.generate(**batch, max_new_tokens=8, num_beams=1)[:, width:]
        assert not torch.equal(expected, greedy)
        defaults = dataclasses.replace(model.generation_config, num_beams=3)
        for own, asked in ((1, {"num_beams": 3}), (3, {})):
            defaults = dataclasses.replace(model.generation_config, num_beams=own)
            monkeypatch.setattr(model, "generation_config", defaults)
            steps = list(model.stream(**batch, max_new_tokens=8, **asked))
            assert torch.equal(torch.stack([step.token_ids for step in steps], 1), expected)
            assert None not in steps[-1].finish_reasons
            put: list[torch.Tensor] = []
            streamer = types.SimpleNamespace(put=put.append, end=lambda: None)
            model.generate(**batch, max_new_tokens=8, streamer=streamer, **asked)
            assert torch.equal(torch.stack(put[1:], 1), expected)

    def test_a_continued_cache_takes_no_beams(self, model, monkeypatch) -> None:
        defaults = dataclasses.replace(model.generation_config, num_beams=3)
        monkeypatch.setattr(model, "generation_config", defaults)
        row = make_batch(ROWS)["input_ids"][:1, -1:]
        cached = [
            model.generate(
                row, max_new_tokens=8, past_key_values=model.new_cache(1, initial_length=16), **more
            )
            for more in ({}, {"num_beams": 1})
        ]
        assert torch.equal(*cached)
        with pytest.raises(ArgumentError, match="without num_beams"):
            model.generate(row, num_beams=2, past_key_values=model.new_cache(1))


class TestWhatIsReported:
    def test_logprobs_scores_and_logits_are_those_of_a_full_forward_pass(self, model) -> None:
        batch = make_batch(ROWS)
        wanted = {"output_logprobs": True, "output_scores": True, "output_logits": True}
        output = run(model, batch, repetition_penalty=1.5, **wanted)
        width = batch["input_ids"].shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(output.sequences[:, width:])], 1)
        full = model(**dict(batch, input_ids=output.sequences, attention_mask=mask)).logits.float()
        for row, count in enumerate(output.num_new_tokens):
            for step in range(count):
                logits = full[row, width + step - 1]
                token = output.sequences[row, width + step]
                torch.testing.assert_close(output.logits[step][row], logits, atol=2e-3, rtol=0)
                torch.testing.assert_close(
                    output.logprobs[row, step], logits.log_softmax(0)[token], atol=2e-3, rtol=0
                )
                assert output.scores[step][row].argmax() == token
            assert output.logprobs[row, count:].eq(0).all()
            assert all(scores[row].isnan().all() for scores in output.scores[count:])

    def test_a_plain_tensor_by_default(self, model) -> None:
        batch = make_batch(ROWS)
        ids = model.generate(**batch, max_new_tokens=4)
        assert isinstance(ids, torch.Tensor)
        assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])

    def test_fields_that_were_not_asked_for_are_none(self, model) -> None:
        output = run(model, make_batch(ROWS))
        assert output.keys() == ["sequences", "finish_reasons", "num_new_tokens"]

    def test_asking_for_what_is_not_returned_warns(self, model) -> None:
        with pytest.warns(
            AudioFlamingoWarning, match="no effect of output_logprobs without return_dict"
        ) as w:
            model.generate(torch.ones(1, 2).long(), max_new_tokens=1, output_logprobs=True)
        assert w[0].filename == __file__


class TestTheModel:
    def test_audio_goes_into_the_prefill_only(self) -> None:
        model = ScriptedModel(random_script(512), vocab_size=512)
        ids = torch.full((2, 760), 1)
        ids[1, 5:755] = AUDIO_TOKEN_ID
        model.generate(ids, input_features=torch.zeros(1, 128, 3000), max_new_tokens=3)
        assert model.num_windows == [1]
        assert len(model.num_rows) == 3

    def test_the_prompt_is_run_once_for_all_its_answers(self) -> None:
        model = ScriptedModel(random_script())
        model.generate(torch.ones(2, 2).long(), do_sample=True, num_return_sequences=3, max_new_tokens=3)
        assert model.num_rows == [2, 6, 6]

    def test_one_read_from_the_device_a_step(self, monkeypatch) -> None:
        reads = []
        monkeypatch.setattr(choosing, "to_host", lambda tensor: reads.append(1) or tensor.tolist())
        model = ScriptedModel(random_script())
        model.generate(
            torch.ones(2, 2).long(), max_new_tokens=7, repetition_penalty=1.2, no_repeat_ngram_size=2
        )
        assert len(reads) == len(model.num_rows) == 7

    def test_a_model_in_training_answers_in_evaluation_mode_and_trains_on(self) -> None:
        model = lively_model()
        model.model.language_model.layers[0].mlp.down_proj = torch.nn.Sequential(
            model.model.language_model.layers[0].mlp.down_proj, torch.nn.Dropout(0.9)
        )
        batch = make_batch(ROWS[:2])
        model.eval()
        expected = answers(run(model, batch))
        model.train()
        model.lm_head.eval()
        assert answers(run(model, batch)) == expected
        assert model.training
        assert not model.lm_head.training
        assert all(m.training for m in model.model.modules())
        model.eval()
        model.model.language_model.layers[0].mlp.down_proj.train()  # as a freshly added adapter is
        assert answers(run(model, batch)) == expected

    @pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
    def test_nan_is_an_error_that_names_the_row(self, options) -> None:
        model = ScriptedModel(
            lambda tokens: torch.full((32,), torch.nan if tokens[0] == 2 and len(tokens) > 2 else 0.0)
        )
        with pytest.raises(AudioFlamingoError, match=r"NaN"):
            model.generate(torch.tensor([[1], [2]]), max_new_tokens=5, pad_token_id=0, **options)

    def test_forbidding_every_token_is_an_error(self) -> None:
        model = ScriptedModel(lambda tokens: torch.zeros(4), vocab_size=4)
        with pytest.raises(AudioFlamingoError, match="no_repeat_ngram_size"):
            model.generate(torch.tensor([[1]]), max_new_tokens=10, no_repeat_ngram_size=1)

    def test_ids_on_another_device_come_back_there(self, model) -> None:
        ids = torch.ones(1, 3, dtype=torch.int32)
        assert model.generate(ids, max_new_tokens=2).dtype == torch.int32


class TestTheMask:
    def test_padding_ids_are_padding_when_no_mask_is_given(self, model) -> None:
        ids = torch.tensor([[PAD, PAD, 11, 12], [13, 14, 15, 16]])
        mask = (ids != PAD).long()
        assert answers(run(model, {"input_ids": ids})) == answers(
            run(model, {"input_ids": ids, "attention_mask": mask})
        )

    def test_unless_they_end_answers(self, model) -> None:
        ids = torch.tensor([[PAD, 11, 12]])
        whole = run(model, {"input_ids": ids, "attention_mask": torch.ones(1, 3)}, eos_token_id=PAD)
        assert answers(run(model, {"input_ids": ids}, eos_token_id=PAD)) == answers(whole)

    def test_a_mask_longer_by_the_cached_tokens(self) -> None:
        model = ScriptedModel(random_script())
        ids = torch.tensor([[0, 4, 5]])
        short = run(model, {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])})
        long = run(model, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])})
        assert answers(short) == answers(long)


class TestWhereAValueComesFrom:
    @pytest.fixture
    def model(self) -> ScriptedModel:
        model = ScriptedModel(random_script())
        model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=[], pad_token_id=0)
        return model

    def count(self, model: ScriptedModel, **options: Any) -> int:
        return model.generate(torch.ones(1, 2).long(), **options).shape[1] - 2

    def test_the_caller_wins_over_the_config_and_none_is_not_a_value(self, model) -> None:
        assert self.count(model) == 5
        assert self.count(model, max_new_tokens=None) == 5
        assert self.count(model, max_new_tokens=3) == 3
        assert self.count(model, max_length=6) == 4
        assert self.count(model, generation_config={"max_new_tokens": 7}) == 7
        assert self.count(model, generation_config={"max_length": 6}) == 4
        assert self.count(model, generation_config=GenerationConfig(max_new_tokens=7)) == 7
        assert self.count(model, generation_config=GenerationConfig(max_length=6)) == 4
        assert self.count(model, generation_config={"max_new_tokens": 7}, max_new_tokens=2) == 2

    def test_a_file_that_limits_the_length_in_its_own_way(self, model) -> None:
        model.generation_config = GenerationConfig.from_dict({"max_length": 9})
        assert self.count(model) == 7
        assert self.count(model, max_new_tokens=12) == 12

    def test_a_default_limit_that_is_not_twenty(self, model) -> None:
        model.generation_config = GenerationConfig.from_dict({})
        output = model.generate(torch.ones(1, 2).long(), max_length=None, return_dict_in_generate=True)
        assert output.num_new_tokens == [1024]
        assert output.finish_reasons == ["length"]

    def test_a_config_object_takes_the_special_ids_of_the_model(self, model) -> None:
        model.generation_config.eos_token_id = 3
        model._script = lambda tokens: torch.eye(32)[[5, 3][len(tokens) % 2]]
        assert self.count(model, generation_config=GenerationConfig(max_new_tokens=7)) == 2
        assert self.count(model, generation_config=GenerationConfig(max_new_tokens=7, eos_token_id=9)) == 7

    def test_both_limits_warn(self, model) -> None:
        with pytest.warns(
            AudioFlamingoWarning, match="max_length=9 has no effect beside max_new_tokens=3"
        ) as w:
            assert self.count(model, max_new_tokens=3, max_length=9) == 3
        assert w[0].filename == __file__

    def test_options_of_a_file_that_are_not_implemented_warn(self, model) -> None:
        model.generation_config = GenerationConfig.from_dict(
            {"typical_p": 0.9, "epsilon_cutoff": 0.0, "use_cache": True}
        )
        with pytest.warns(AudioFlamingoWarning, match=r"asks for \{'typical_p': 0.9\}, which"):
            self.count(model, max_new_tokens=1)

    def test_the_models_config_is_left_as_it_was(self, model) -> None:
        before = model.generation_config.to_dict()
        self.count(model, max_length=6, temperature=0.5, do_sample=True, seed=1)
        assert model.generation_config.to_dict() == before

    @pytest.mark.parametrize(
        "options",
        [
            {"use_cache": True, "guidance_scale": 1, "output_attentions": False, "logits_processor": None},
            {"do_sample": True, "seed": 3, "top_k": -1},
        ],
    )
    def test_what_cannot_matter_is_taken(self, model, options) -> None:
        """Calls written for transformers pass such words; they were refused as unknown."""
        plain = {"do_sample": True, "seed": 3, "top_k": 0} if "seed" in options else {}
        ids = torch.arange(10, 16)[None]
        answer = model.generate(ids, max_new_tokens=4, **options)
        assert torch.equal(answer, model.generate(ids, max_new_tokens=4, **plain))


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
            ({"labels": torch.ones(1, 2)}, "generate.* got unknown argument.* 'labels'"),
            ({"use_cache": False}, "use_cache=False: generate always keeps a cache"),
            ({"assistant_model": [len]}, r"generate\(assistant_model=...\) is not implemented"),
            ({"guidance_scale": 2.0}, "not implemented"),
            ({"output_attentions": True}, "not implemented"),
            ({"generation_config": {"temprature": 1}}, "did you mean 'temperature'"),
            ({"generation_config": 3}, "must be a GenerationConfig or a dict, got int"),
            ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
            ({"max_new_tokens": 2.5}, "whole number"),
            ({"max_new_tokens": True}, "whole number"),
            ({"max_length": -1}, "max_length must be"),
            ({"min_new_tokens": -1}, "min_new_tokens must be"),
            ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than max_new_tokens=8"),
            ({"min_length": 9, "max_length": 8}, "min_length=9 is more than max_length=8"),
            ({"do_sample": 1}, "do_sample must be True or False"),
            ({"do_sample": True, "temperature": -0.1}, "temperature must be a number of at least 0"),
            ({"do_sample": True, "temperature": float("nan")}, "temperature must be"),
            ({"do_sample": True, "temperature": "hot"}, "temperature must be"),
            ({"do_sample": True, "top_k": -2}, "top_k must be"),
            ({"do_sample": True, "top_p": 0.0}, r"top_p must be a number in \(0, 1\]"),
            ({"do_sample": True, "top_p": 1.1}, "top_p must be"),
            ({"do_sample": True, "min_p": 1.1}, "min_p must be"),
            ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
            ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be"),
            ({"num_beams": 0}, "num_beams must be"),
            ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
            ({"num_return_sequences": 2}, "needs num_beams, or do_sample=True"),
            ({"num_return_sequences": 2, "do_sample": True, "temperature": 0}, "temperature above 0"),
            ({"num_beams": 2, "early_stopping": "always"}, "True, False or 'never'"),
            ({"num_beams": 2, "length_penalty": float("inf")}, "length_penalty must be a number"),
            ({"eos_token_id": -1}, "eos_token_id must be"),
            ({"eos_token_id": [1, "x"]}, "eos_token_id must be"),
            ({"eos_token_id": [1, 99]}, "eos_token_id 99 is outside the vocabulary of 32"),
            ({"pad_token_id": 32}, "pad_token_id 32 is outside the vocabulary of 32"),
            ({"stop_strings": [""]}, "stop_strings must be"),
            ({"stop_strings": "x"}, "stop_strings need tokenizer="),
            ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, "exclude each other"),
            ({"do_sample": True, "seed": -1}, "seed must be"),
            ({"do_sample": True, "seed": 1.5}, "seed must be"),
            ({"do_sample": True, "seed": [1, 2]}, "seed has 2 entries, 1 are needed"),
            ({"do_sample": True, "generator": 3}, "generator must be"),
            ({"attention_mask": torch.ones(1, 1)}, "attention_mask must be"),
            ({"attention_mask": [[1, 1]]}, "attention_mask must be"),
            ({"input_features": [[0.0]]}, "input_features must be a tensor, got list"),
            ({"attention_mask": torch.zeros(1, 2)}, "row 0 of input_ids is all padding"),
        ],
    )
    def test_options(self, options, message) -> None:
        model = ScriptedModel(random_script())
        with pytest.raises(ArgumentError, match=message):
            model.generate(torch.ones(1, 2).long(), **options)
        assert model.num_rows == []

    @pytest.mark.parametrize(
        ("input_ids", "message"),
        [
            (None, "input_ids must be a tensor"),
            ([[1, 2]], "input_ids must be a tensor"),
            (torch.ones(3).long(), r"\(batch, length\), got torch.int64 \(3,\)"),
            (torch.ones(1, 3), "whole numbers"),
            (torch.ones(1, 0).long(), "hold no token"),
            (torch.tensor([[3, 32]]), "input_ids hold 32; the vocabulary has 32"),
            (torch.tensor([[3, -1]]), "input_ids hold -1"),
        ],
    )
    def test_prompts(self, input_ids, message) -> None:
        with pytest.raises(ArgumentError, match=message):
            ScriptedModel(random_script()).generate(input_ids)

    def test_stop_strings_of_several_rows_need_a_padding_id(self) -> None:
        options = {"stop_strings": "x", "tokenizer": PieceTokenizer("x")}
        with pytest.raises(ArgumentError, match="need pad_token_id"):
            ScriptedModel(random_script()).generate(torch.ones(2, 1).long(), **options)


class TestOptionsWithoutEffect:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"temperature": 0.7, "top_p": 0.9},
                "temperature=0.7, top_p=0.9 has no effect without do_sample=True",
            ),
            ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without num_beams above 1"),
        ],
    )
    def test_one_warning(self, options, message) -> None:
        with pytest.warns(AudioFlamingoWarning, match=message) as w:
            ScriptedModel(random_script()).generate(torch.ones(1, 1).long(), max_new_tokens=1, **options)
        assert len(w) == 1
        assert w[0].filename == __file__

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0},
            {"temperature": 1.0, "top_p": 1.0},
            {"seed": 3},
            {"do_sample": True, "temperature": 0.7},
        ],
    )
    def test_no_warning_where_nothing_is_lost(self, options) -> None:
        model = ScriptedModel(random_script())
        model.generation_config = GenerationConfig(temperature=0.3, top_k=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(torch.ones(1, 1).long(), max_new_tokens=1, **options)
