"""The streamer that prints."""

from __future__ import annotations

import io

import pytest
import torch

from audioflamingo.errors import ArgumentError
from audioflamingo.processor.tokenizer import TextStreamer, Tokenizer
from tests.support.generation_models import ScriptedModel, says
from tests.support.tiny_tokenizer import write_tiny_processor


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_processor(tmp_path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a日本<|im_end|>\n"),
        ({"skip_prompt": True}, "日本<|im_end|>\n"),
        ({"skip_prompt": True, "skip_special_tokens": True}, "日本\n"),
    ],
)
def test_prints_what_generate_gives(tokenizer, options, expected) -> None:
    prompt, answer = tokenizer.encode_plain("a"), tokenizer.encode_plain("日本")
    script = says(*[[]] * prompt[0], [*answer, tokenizer.eos_token_id], vocab_size=600)
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, **options, file=file)
    for _ in range(2):  # a streamer can be used again
        ScriptedModel(script, 600).generate(
            torch.tensor([prompt]), eos_token_id=tokenizer.eos_token_id, max_new_tokens=20, streamer=streamer
        )
    assert file.getvalue() == expected * 2


def test_prints_whole_characters_as_they_come(tokenizer) -> None:
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, file=file)
    printed = []
    for token_id in tokenizer.encode_plain("日b"):
        streamer.put(torch.tensor([token_id]))
        printed.append(file.getvalue())
    assert printed == ["", "", "日", "日b"]


def test_refuses_a_batch(tokenizer) -> None:
    with pytest.raises(ArgumentError, match="got 2 rows"):
        TextStreamer(tokenizer).put(torch.ones(2, 3).long())


def test_standard_output_by_default(tokenizer, capsys) -> None:
    streamer = TextStreamer(tokenizer)
    streamer.put(torch.tensor([tokenizer.encode_plain("ok")]))
    streamer.end()
    assert capsys.readouterr().out == "ok\n"
