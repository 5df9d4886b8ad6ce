"""A checkpoint that asks for beams is searched with them through HTTP too, streamed or not."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from audioflamingo.audio.loading import load_audio
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription import transcribe
from tests.support.audio_files import encode
from tests.support.server_runs import RunningServer, chat_body, running_server
from tests.unit.server.test_transcriptions import SPEECH, post, text_of

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def searcher(model: Any) -> Any:
    """The model of the other tests, as a checkpoint that asks for three beams."""
    searcher = copy.copy(model)
    searcher.generation_config = dataclasses.replace(model.generation_config, num_beams=3)
    return searcher


@pytest.fixture(scope="module")
def searching(searcher: Any, processor: AudioFlamingo3Processor) -> Iterator[RunningServer]:
    """A server for it."""
    with running_server(searcher, processor) as running:
        yield running


def library_answers(model: Any, processor: AudioFlamingo3Processor, text: str, **options: Any) -> list[str]:
    messages = [{"role": "user", "content": text}]
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    output = model.generate(**batch, max_new_tokens=8, **options)
    return processor.decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[return-value]


def streamed_text(body: str) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n")[:-2]]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def test_a_transcript_is_searched_as_the_librarys_is(
    searching: RunningServer, searcher: Any, processor: AudioFlamingo3Processor
) -> None:
    """The server once transcribed greedily, whatever the checkpoint asked for."""
    data = encode(load_audio(SPEECH)[:, None], 16000, "flac")
    expected = list(transcribe(searcher, processor, data))
    greedy = list(transcribe(searcher, processor, data, num_beams=1))
    assert text_of(expected) != text_of(greedy)
    assert post(searching, data).json()["text"] == text_of(expected)
    reply = post(searching, data, stream="true").text
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in reply.split("\n\n")[:-2]]
    assert "".join(delta["delta"] for delta in deltas) == done["text"] == text_of(expected)


def test_a_chat_is_searched_and_a_stream_comes_when_the_search_ends(
    searching: RunningServer, searcher: Any, processor: AudioFlamingo3Processor
) -> None:
    expected = library_answers(searcher, processor, "tool call", num_return_sequences=2)
    assert expected[:1] != library_answers(searcher, processor, "tool call", num_beams=1)
    with searching.client() as client:
        body = chat_body("tool call", temperature=0)
        whole = client.post(CHAT, json={**body, "n": 2, "logprobs": True}).json()
        streamed = client.post(CHAT, json={**body, "stream": True}).text
    assert [choice["message"]["content"] for choice in whole["choices"]] == expected
    assert whole["choices"][0]["logprobs"]["content"]
    assert streamed_text(streamed) == expected[0]


def test_what_is_drawn_is_drawn_token_by_token(
    searching: RunningServer, server: RunningServer, processor: AudioFlamingo3Processor
) -> None:
    body = chat_body("tool call", temperature=0.8, seed=5, n=3)
    answers = []
    for running in (searching, server):
        with running.client() as client:
            choices = client.post(CHAT, json=body).json()["choices"]
        answers.append([choice["message"]["content"] for choice in choices])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1
