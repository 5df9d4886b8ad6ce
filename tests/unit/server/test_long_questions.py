"""`on_long` of chats and responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from audioflamingo import Chat
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.scripted_model import tiny_processor
from tests.support.server_runs import RunningServer, audio_part, chat_body, running_server, wav

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def short_processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    processor = tiny_processor(tmp_path_factory.mktemp("processor"))
    processor.max_audio_len = 30
    return processor


@pytest.fixture(scope="module")
def patient(model: Any, short_processor: AudioFlamingo3Processor) -> Iterator[RunningServer]:
    with running_server(model, short_processor) as running:
        yield running


def test_stretches_are_asked_and_shown(
    patient: RunningServer, model: Any, short_processor: AudioFlamingo3Processor
) -> None:
    """As in a conversation of the library, whole and streamed."""
    chat = Chat(model, short_processor, on_long="windows")
    chat.add_audio(wav(70.0))
    expected = "".join(chat.ask("What is the sound?", max_new_tokens=8, do_sample=False))
    assert len(chat.stretches) == 3
    question = (audio_part(wav(70.0)), "What is the sound?")
    body = chat_body(*question, max_tokens=8, temperature=0, on_long="windows")
    with patient.client() as client:
        reply = client.post(CHAT, json=body).json()
        assert reply["choices"][0]["message"]["content"] == expected
        assert reply["stretches"] == [stretch.to_dict() for stretch in chat.stretches]
        assert reply["usage"]["prompt_tokens_details"]["audio_tokens"] == pytest.approx(70 * 25, abs=3)
        with client.stream("POST", CHAT, json={**body, "stream": True}) as stream:
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    assert chunks[0]["stretches"] == reply["stretches"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


def test_with_the_official_client(patient: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{patient.url}/v1", api_key="none", max_retries=0, timeout=60)
    reply = client.chat.completions.create(
        **chat_body(audio_part(wav(31.0)), "What is it?"), extra_body={"on_long": "windows"}
    )
    assert reply.model_extra is not None
    assert len(reply.model_extra["stretches"]) == 2


def test_responses_take_it_too(patient: RunningServer) -> None:
    """The same answer and the same stretches as a chat's, whole and streamed."""
    body = chat_body(audio_part(wav(31.0)), "What is it?", max_tokens=8, temperature=0, on_long="windows")
    content = [audio_part(wav(31.0)), {"type": "input_text", "text": "What is it?"}]
    limits = {"model": "tiny", "max_output_tokens": 8, "temperature": 0}
    asked = {**limits, "input": [{"role": "user", "content": content}]}
    with patient.client() as client:
        chat = client.post(CHAT, json=body).json()
        reply = client.post("/v1/responses", json={**asked, "on_long": "windows"}).json()
        assert reply["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        assert reply["stretches"] == chat["stretches"]
        assert len(reply["stretches"]) == 2
        streamed = client.post("/v1/responses", json={**asked, "on_long": "windows", "stream": True}).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert events[-1]["response"]["stretches"] == chat["stretches"]
        assert client.post("/v1/responses", json=asked).status_code == 400
        wrong = client.post("/v1/responses", json={**asked, "on_long": "truncate"})
        assert wrong.json()["error"]["param"] == "on_long"


def test_what_fits_is_heard_at_once_and_what_does_not_is_refused(patient: RunningServer) -> None:
    with patient.client() as client:
        short = chat_body(audio_part(wav(29.0)), "What?", on_long="windows")
        reply = client.post(CHAT, json=short).json()
        assert reply["usage"]["prompt_tokens_details"]["audio_tokens"] == 725
        assert "stretches" not in reply
        for on_long in (None, "error"):
            long = chat_body(audio_part(wav(31.0)), "What?", on_long=on_long)
            assert client.post(CHAT, json=long).status_code == 400
        wrong = client.post(CHAT, json=chat_body("What?", on_long="truncate"))
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "on_long"
        broken = {"type": "input_audio", "input_audio": {"data": "!!"}}
        for stream in (False, True):
            bad = chat_body(broken, on_long="windows", stream=stream)
            assert client.post(CHAT, json=bad).status_code == 400
