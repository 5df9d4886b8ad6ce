"""Decode steps of fixed shape, as a GPU replays them, here without being recorded: the tokens of the plain engine."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from audioflamingo.engine import captured_steps
from audioflamingo.engine.captured_steps import CapturedSteps, DecodeStep, Flight
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Request, SamplingParams
from audioflamingo.engine.sampling import LogitsRules, Uniforms
from audioflamingo.engine.stopping import StopRules
from audioflamingo.errors import AudioFlamingoError, AudioFlamingoWarning
from audioflamingo.network.kv import KVStore, Span
from audioflamingo.processor.prompt import Prompt
from tests.support.generation_models import MANY_EOS, lively_model
from tests.support.tiny_model import make_batch

BATCH = make_batch([([300, 40], 6), ([], 4), ([50], 9)])
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "rows that end at different steps": {"eos_token_id": MANY_EOS},
    "the shortest answer": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "no end before": {"eos_token_id": MANY_EOS, "min_new_tokens": 7},
    "seeded draws": {"do_sample": True, "seed": 3, "top_k": 40, "top_p": 0.9, "temperature": 1.3},
    "seeded draws that end": {"do_sample": True, "seed": 3, "eos_token_id": MANY_EOS, "min_new_tokens": 3},
    "draws in order": {"do_sample": True, "eos_token_id": MANY_EOS},
    "several answers": {"do_sample": True, "seed": 1, "num_return_sequences": 3},
    "history": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": MANY_EOS},
    "beams": {"num_beams": 3, "eos_token_id": MANY_EOS, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "MIN_WINDOW", 64)
    monkeypatch.setattr(captured_steps, "WINDOW_FACTOR", 2)


def capturing(model: Any) -> Any:
    """The model with steps of fixed shape, which nothing records."""
    model.compiles_steps = True
    model.kept_steps = CapturedSteps(is_recorded=False)
    return model


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in which order: a step is started, its tokens are read."""
    noted: list[str] = []
    run, tokens = DecodeStep.run, Flight.tokens

    def noting_run(self: DecodeStep) -> None:
        noted.append("run")
        run(self)

    def noting_tokens(self: Flight) -> list[int]:
        noted.append("read")
        return tokens(self)

    monkeypatch.setattr(DecodeStep, "run", noting_run)
    monkeypatch.setattr(Flight, "tokens", noting_tokens)
    return noted


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_answers_are_those_of_the_plain_engine(options: dict[str, Any], events: list[str]) -> None:
    options = {"max_new_tokens": 24, "eos_token_id": [], **options}
    plain, model = lively_model(), capturing(lively_model())
    torch.manual_seed(5)
    expected = plain.generate(**BATCH, **options)
    after = torch.rand(1)
    assert not events
    torch.manual_seed(5)
    found = model.generate(**BATCH, **options)
    assert found.tolist() == expected.tolist()
    assert torch.equal(torch.rand(1), after), "another number of random numbers was drawn"
    assert ("run" in events) == (options["max_new_tokens"] > 1)
    torch.manual_seed(5)
    assert model.generate(**BATCH, **options).tolist() == expected.tolist(), (
        "with the steps of the first call"
    )


def test_scores_and_logprobs_are_those_of_the_plain_engine(events: list[str]) -> None:
    wanted = {
        "max_new_tokens": 6,
        "eos_token_id": [],
        "return_dict_in_generate": True,
        **dict.fromkeys(("output_scores", "output_logits", "output_logprobs"), True),
    }
    expected = lively_model().generate(**BATCH, **wanted)
    found = capturing(lively_model()).generate(**BATCH, **wanted)
    assert "run" in events
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=0)


def test_a_step_is_started_before_the_tokens_of_the_last_one_are_read(events: list[str]) -> None:
    capturing(lively_model()).generate(**BATCH, max_new_tokens=6, eos_token_id=[])
    assert events == ["run", "run", "read", "run", "read", "run", "read", "run", "read", "read"]


def test_a_stream_gives_one_token_a_step(events: list[str]) -> None:
    lengths = []
    for _ in capturing(lively_model()).stream(**BATCH, max_new_tokens=5, eos_token_id=[]):
        lengths.append(events.count("read"))
    assert lengths == [0, 1, 2, 3, 4]


def test_rows_of_no_use_touch_only_their_slot() -> None:
    model = lively_model()
    store = KVStore(2, 40)
    step = DecodeStep(model, store, num_rows=4, window=16, scratch=0)
    step.load([3], [Span(10, 12, 4)])
    with torch.no_grad():
        for _ in range(5):
            step.run()
    for buffer in (*store.keys, *store.values):
        assert buffer is not None
        written = buffer.abs().sum((0, 2)).nonzero()[:, 0].tolist()
        assert written == [0, 14, 15, 16, 17, 18]


def make_request(
    ids: list[int], seed: int, max_new_tokens: int, eos: frozenset[int] = frozenset(), **rules: Any
) -> Request:
    params = SamplingParams(LogitsRules(**rules), StopRules(eos, (), None), max_new_tokens)
    uniforms = Uniforms(1, [seed]) if rules.get("do_sample") else None
    return Request(Prompt(ids), params, uniforms=uniforms)


def requests() -> list[Request]:
    """Of all kinds: short and long, drawn and not, with rules that need to see every token."""
    eos = frozenset(MANY_EOS)
    return [
        make_request([5, 9, 200], 0, 30),
        make_request([7] * 20, 1, 9, do_sample=True, top_k=30),
        make_request([300, 301, 302, 303], 2, 25, eos, do_sample=True, temperature=1.5),
        make_request([11, 12], 3, 14, repetition_penalty=1.4),
        make_request([13] * 40, 4, 40),
        make_request([21, 22, 23], 5, 3, do_sample=True, top_p=0.8, min_new_tokens=2, eos_token_ids=(40,)),
    ]


def answers(model: Any, cancelled: int | None = None, **options: Any) -> list[list[int]]:
    """Answers of requests that come one after the other while earlier ones are answered."""
    engine = Engine(model, None, EngineOptions(**{"cache_tokens": 400, "max_rows": 5, **options}))
    engine.warm_up()
    groups = []
    for request in requests():
        groups.append(engine.submit(request))
        for _ in range(3):
            engine.step()
        if cancelled is not None and len(groups) == cancelled + 3:
            groups[cancelled].request.cancel()
    while engine.has_work:
        engine.step()
    assert all(group.error is None for group in groups)
    return [group.sequences[0].new_ids for place, group in enumerate(groups) if place != cancelled]


@pytest.mark.parametrize("cancelled", [None, 0])
def test_requests_that_join_and_leave_get_the_answers_that_they_get_without(
    cancelled: int | None, events: list[str]
) -> None:
    expected = answers(lively_model(), cancelled)
    assert not events
    assert answers(capturing(lively_model()), cancelled) == expected
    assert events.count("run") > 10


def test_a_small_cache_still_takes_what_fits_exactly() -> None:
    """The slot of the rows of no use is not one of those that were asked for."""
    engine = Engine(capturing(lively_model()), None, EngineOptions(cache_tokens=20))
    group = engine.submit(make_request([5, 9, 200], 0, 17))
    while engine.has_work:
        engine.step()
    assert len(group.sequences[0].new_ids) == 17


def test_a_row_without_finite_logits_fails_as_in_the_plain_engine() -> None:
    messages = []
    for model in (lively_model(), capturing(lively_model())):
        with torch.no_grad():
            model.lm_head.weight[7] = torch.nan
        with pytest.raises(AudioFlamingoError) as caught:
            model.generate(**BATCH, max_new_tokens=4, eos_token_id=[])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_changed_weights_are_not_answered_with_old_steps() -> None:
    """A recorded step would go on reading the weights that were there."""
    model = capturing(lively_model())
    model.generate(**BATCH, max_new_tokens=4)
    kept = model.kept_steps._kept[0]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert model.kept_steps.lend(model, None) is not kept
    assert model.kept_steps._kept == []


def test_adapters_of_peft_that_are_switched_are_not_answered_with_old_steps() -> None:
    """The weights stay where they are: what is recorded would go on with the adapter, or without."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = capturing(lively_model())
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.generate(**BATCH, max_new_tokens=4)
    kept = model.kept_steps._kept[0]
    assert model.kept_steps.lend(model, None) is kept
    model.kept_steps.give_back(kept)
    with adapted.disable_adapter():
        assert model.kept_steps.lend(model, None) is not kept


def test_a_model_that_was_never_asked_to_capture_records_nothing(events: list[str]) -> None:
    model = lively_model()
    model.generate(**BATCH, max_new_tokens=4)
    assert (model.compiles_steps, model.kept_steps, events) == (False, None, [])


def test_a_copy_of_a_model_has_steps_of_its_own() -> None:
    model = capturing(lively_model())
    model.generate(**BATCH, max_new_tokens=4)
    assert copy.deepcopy(model).kept_steps._kept == []


def only_warning(model: Any, expected: torch.Tensor) -> str:
    """Of two calls, which give what is expected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert model.generate(**BATCH, max_new_tokens=8).tolist() == expected.tolist()
    (warning,) = [str(w.message) for w in caught if issubclass(w.category, AudioFlamingoWarning)]
    return warning


def test_a_step_that_cannot_be_recorded_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lively_model().generate(**BATCH, max_new_tokens=8)
    model = capturing(lively_model())
    model.kept_steps = CapturedSteps()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def record(self: DecodeStep, memory: Any, with_kernels: bool = True) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise ValueError("the recording was broken off")

    monkeypatch.setattr(DecodeStep, "record", record)
    warning = only_warning(model, expected)
    assert "RuntimeError: operation not permitted when stream is capturing)" in warning


def test_steps_are_recorded_without_the_kernels_where_these_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine without a C compiler, which triton needs."""
    expected = lively_model().generate(**BATCH, max_new_tokens=8)
    model = capturing(lively_model())
    model.kept_steps = CapturedSteps()
    pools = iter(range(1, 10))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    recorded = []

    def record(self: DecodeStep, memory: Any, with_kernels: bool = True) -> None:
        if with_kernels:
            raise RuntimeError("Failed to find C compiler.")
        recorded.append((self.num_rows, memory))

    monkeypatch.setattr(DecodeStep, "record", record)
    warning = only_warning(model, expected)
    assert "captured without this package's kernels (RuntimeError: Failed to find C compiler.)" in warning
    assert (model.kept_steps.has_failed, recorded) == (False, [(4, 2)]), "or in memory of the failed attempt"


def test_graphs_of_two_stores_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads may run them at the same time; and what a store had before it grew is not taken up again."""
    model = lively_model()
    model.compiles_steps, model.kept_steps = True, CapturedSteps()
    pools = iter(range(1, 10))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    recorded = []
    monkeypatch.setattr(DecodeStep, "record", lambda self, memory: recorded.append(memory))
    stores = [model.kept_steps.lend(model, 40) for _ in range(2)]
    for steps in (*stores, stores[0]):
        steps.store.keys[0] = torch.zeros(1)
        assert steps.step(1, 10) is not None
    assert recorded == [1, 2, 3]


def test_a_model_on_the_cpu_says_that_it_has_no_graphs() -> None:
    model = lively_model()
    model.compiles_steps = True
    with pytest.warns(AudioFlamingoWarning, match="the model is on cpu, CUDA graphs are of NVIDIA GPUs"):
        found = model.generate(**BATCH, max_new_tokens=3)
    assert found.tolist() == lively_model().generate(**BATCH, max_new_tokens=3).tolist()
