"""Log-likelihood of options: against the whole sequences in one forward pass, and against greedy decoding."""

from __future__ import annotations

import pytest
import torch

from audioflamingo.engine.likelihood import _score_tokens
from audioflamingo.errors import ArgumentError, ContextLengthError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.tiny_training import write_dataset, write_model

OPTIONS = ["hello", "a dog barking", "x"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    write_model(folder / "model")
    data = write_dataset(folder / "data", 1)
    clip = next(path for path in sorted(data.parent.rglob("*.wav")))
    content = [{"type": "audio", "path": str(clip)}, {"type": "text", "text": "What is it?"}]
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder / "model")
    processor = AudioFlamingo3Processor.from_pretrained(folder / "model")
    return model, processor, [{"role": "user", "content": content}]


@torch.no_grad()
def whole_pass(model, processor, conversation: list, option: str, ends: list[int]) -> float:
    batch = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    ids = processor.tokenizer.encode_plain(option) + ends
    num_prompt = batch["input_ids"].shape[1]
    input_ids = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
    logits = model(
        input_ids=input_ids,
        input_features=batch["input_features"],
        input_features_mask=batch["input_features_mask"],
    ).logits
    logprobs = logits[0, num_prompt - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("is_whole", [True, False])
def test_options_score_as_whole_sequences_do(loaded, is_whole: bool) -> None:
    model, processor, conversation = loaded
    ends = [processor.tokenizer.eos_token_id] if is_whole else []
    scores = model.score(processor, conversation, OPTIONS, is_whole=is_whole)
    assert [score.text for score in scores] == OPTIONS
    for score in scores:
        wanted = whole_pass(model, processor, conversation, score.text, ends)
        assert score.logprob == pytest.approx(wanted, abs=1e-3)
        assert score.num_tokens == len(processor.tokenizer.encode_plain(score.text)) + len(ends)
    (alone,) = model.score(processor, conversation, OPTIONS[1:2], is_whole=is_whole)
    assert alone.logprob == pytest.approx(scores[1].logprob, abs=1e-4)


def test_greedy_means_the_most_likely_token_in_each_place() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert _score_tokens("x", [1, 0], logits).is_greedy
    assert not _score_tokens("x", [1, 2], logits).is_greedy
    wanted = 2 - torch.tensor([1.0, 2.718281828**2, 2.718281828]).sum().log()
    assert _score_tokens("x", [1], logits[:1]).logprob == pytest.approx(float(wanted), abs=1e-5)


def test_bad_options(loaded) -> None:
    model, processor, conversation = loaded
    for options in ([], "hello"):
        with pytest.raises(ArgumentError, match="options must be a list"):
            model.score(processor, conversation, options)
    with pytest.raises(ArgumentError, match="must not be empty"):
        model.score(processor, conversation, [""], is_whole=False)
    with pytest.raises(ContextLengthError, match="prompt and longest option"):
        model.score(processor, conversation, ["hello " * model.config.text_config.max_position_embeddings])
