"""One decode step as a function of tensors: it compiles whole, and gives the tokens that it gives uncompiled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from audioflamingo.network.decode_step import decode_step
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span
from tests.support.generation_models import lively_model

LENGTHS = (5, 11, 3)
NUM_STEPS = 12
NUM_SLOTS = 70


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 400, (length,), generator=generator) for length in LENGTHS]


def prefilled(model: Any) -> tuple[KVStore, list[Span], Tensor]:
    """Rows of unequal length in spans of unequal size, out of order; and the first token of each answer."""
    store = KVStore(model.config.text_config.num_hidden_layers, NUM_SLOTS)
    spans = [Span(40, 30), Span(0, 25), Span(25, 15)]
    layout = PackedLayout.of([span.start for span in spans], [0] * 3, LENGTHS, torch.device("cpu"))
    x = model.get_input_embeddings()(torch.cat(prompts()))
    hidden = model.model.language_model.forward_packed(x, KVView(store, layout))
    for span, length in zip(spans, LENGTHS, strict=True):
        span.length = length
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    return store, spans, model.lm_head(hidden[last]).argmax(-1)


def answers_alone(model: Any) -> list[list[int]]:
    """Each row's tokens by running it alone and whole, every time from the start."""
    answers = []
    for ids in prompts():
        for _ in range(NUM_STEPS + 1):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        answers.append(ids[-NUM_STEPS - 1 :].tolist())
    return answers


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_step_of_tensors_gives_the_tokens_of_each_row_alone(backend: str | None) -> None:
    """Not compiled, and compiled whole: lists of Python numbers on the way once forbade it."""
    model = lively_model()
    store, spans, tokens = prefilled(model)
    layout = PackedLayout.of_step(spans, window=30, device=torch.device("cpu"))
    view = KVView(store, layout)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        if backend == "eager":
            return graph.forward
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    step = functools.partial(decode_step, model, view=view)
    if backend is not None:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend=count)
    found = [tokens]
    for _ in range(NUM_STEPS):
        found.append(step(found[-1]).argmax(-1))
        layout.advance()
    assert torch.stack(found, dim=1).tolist() == answers_alone(model)
    assert len(graphs) == (backend is not None), "the step was compiled again"


@torch.no_grad()
def test_a_step_of_tensors_equals_the_step_whose_numbers_are_known() -> None:
    model = lively_model()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        store, spans, tokens = prefilled(model)
        device = torch.device("cpu")
        steps = PackedLayout.of_step(spans, window=30, device=device)
        known = PackedLayout.of([span.start for span in spans], LENGTHS, [1] * 3, device)
        for name in ("positions", "slots", "starts", "ends"):
            assert torch.equal(getattr(steps, name), getattr(known, name)), name
        x = model.embed(tokens)
        expected = model.packed_logits(x, KVView(store, known))
        torch.testing.assert_close(model.packed_logits(x, KVView(store, steps)), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_step_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model()
    store, spans, tokens = prefilled(model)
    layout = PackedLayout.of_step(spans, window=30, device=torch.device("cpu"))

    def fail(*_: Any) -> Any:
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, fail)
    decode_step(model, tokens, KVView(store, layout))
