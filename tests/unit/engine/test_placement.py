"""`generate` on a GPU, without one: see `tests.support.fake_cuda` for the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import fake_cuda
from tests.support.fake_cuda import Playback
from tests.support.tiny_model import make_batch, tiny_model

GENERATION_MODULES = (
    "audioflamingo.engine.beam_search",
    "audioflamingo.engine.generate",
    "audioflamingo.engine.choosing",
    "audioflamingo.engine.sampling",
    "audioflamingo.processor.collate",
)
EOS = list(range(100, 300))  # so many that rows finish at different steps
CASES = {
    "greedy": {},
    "rules": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 2},
    "sampling": {
        "do_sample": True,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "seed": 0,
        "num_return_sequences": 2,
    },
    "beams": {
        "num_beams": 3,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "num_return_sequences": 2,
    },
    "beam sampling": {"num_beams": 2, "do_sample": True, "seed": 0, "eos_token_id": [100]},
}


@pytest.fixture
def playback(monkeypatch: pytest.MonkeyPatch) -> Playback:
    monkeypatch.setattr(fake_cuda, "MODULES", (*fake_cuda.MODULES, *GENERATION_MODULES))
    return Playback(monkeypatch)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_generation_stays_on_the_device(playback: Playback, options: dict[str, Any]) -> None:
    def run(model: Any, batch: dict[str, Any]) -> Any:
        output = model.generate(
            **batch,
            **{"eos_token_id": EOS, **options},
            max_new_tokens=4,
            output_scores=True,
            output_logits=True,
            output_logprobs=True,
            return_dict_in_generate=True,
        )
        return output.sequences

    batch = make_batch([([30], 6), ([], 4)])
    assert playback.compare(run, batch).device.type == "cuda"
    assert playback.devices == {"cuda"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_real_gpu_gives_the_same_tokens(options: dict[str, Any]) -> None:
    batch = make_batch([([30], 6), ([], 4)])
    options = {"max_new_tokens": 4, "eos_token_id": EOS, **options}
    expected = tiny_model().generate(**batch, **options)
    got = tiny_model().to("cuda").generate(**{k: v.to("cuda") for k, v in batch.items()}, **options)
    assert got.tolist() == expected.tolist()
