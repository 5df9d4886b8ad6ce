"""More reports, each tried: answers of a form, what is said about silence (sources in README.md)."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.tokenizer import Tokenizer
from tests.support.audio_files import encode
from tests.support.generation_models import END, stopping_model
from tests.support.server_runs import running_server
from tests.support.tiny_tokenizer import write_tiny_processor

CALL = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["question", "complaint"]},
        "trigger": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
    },
    "required": ["kind", "trigger"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return stopping_model()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))


def call(model: Any, tokenizer: Tokenizer, **options: Any) -> str:
    ids = torch.tensor([tokenizer.encode_prompt("What is it")])
    output = model.generate(
        ids, constraint={"json_schema": CALL}, tokenizer=tokenizer, max_new_tokens=100, **options
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


class TestAnswersOfAForm:
    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_a_model_that_would_rather_end(
        self, model: Any, processor: AudioFlamingo3Processor, num_beams: int
    ) -> None:
        """Its likeliest token is the end, everywhere: that was an error there, and an empty answer elsewhere."""
        text = call(model, processor.tokenizer, logit_bias={END: 100.0}, num_beams=num_beams)
        assert set(json.loads(text)) == {"kind", "trigger"}

    def test_a_model_that_would_rather_indent(self, model: Any, processor: AudioFlamingo3Processor) -> None:
        """Small models write white space to the end of their tokens where a schema lets them."""
        tokenizer = processor.tokenizer
        blank = [i for i in range(len(tokenizer)) if (data := tokenizer.token_bytes(i)) and not data.strip()]
        text = call(model, tokenizer, logit_bias=dict.fromkeys(blank, 60.0))
        value = json.loads(text)
        assert text == json.dumps(value, ensure_ascii=False)

    def test_null_or_a_text(self, model: Any, processor: AudioFlamingo3Processor) -> None:
        texts = {
            call(model, processor.tokenizer, do_sample=True, temperature=3.0, seed=seed) for seed in range(8)
        }
        triggers = [json.loads(text)["trigger"] for text in texts]
        assert all(trigger is None or len(trigger) <= 6 for trigger in triggers)


def test_a_tokenizer_goes_to_another_process(processor: AudioFlamingo3Processor) -> None:
    for other in (pickle.loads(pickle.dumps(processor.tokenizer)), copy.deepcopy(processor.tokenizer)):
        assert other.encode_prompt("hello<sound>") == processor.tokenizer.encode_prompt("hello<sound>")


def test_a_prompt_is_not_the_transcript_of_silence(model: Any, processor: AudioFlamingo3Processor) -> None:
    """Elsewhere the hint came back word for word."""
    silence = encode(np.zeros(2 * 16000, dtype=np.float32), 16000, "wav")
    with running_server(model, processor) as server, server.client() as client:
        reply = client.post(
            "/v1/audio/transcriptions",
            data={"model": "tiny", "prompt": "The assistant is called Jarvix."},
            files={"file": silence},
        )
    assert (reply.json()["text"], reply.headers["x-no-speech"]) == ("", "true")
