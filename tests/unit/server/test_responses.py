"""`POST /v1/responses`, by the official client and by hand."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.server_runs import RunningServer, audio_part, chat_body, wav
from tests.unit.server.test_response_format import Bird

PATH = "/v1/responses"


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def user(*parts: Any) -> list[Any]:
    content = [{"type": "input_text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def chat_answer(server: RunningServer, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    with server.client() as http:
        body = {"model": "tiny", "messages": messages, **fields}
        return http.post("/v1/chat/completions", json=body).json()


def test_it_answers_as_the_chat_does(client: openai.OpenAI, server: RunningServer) -> None:
    clip = audio_part(wav())
    reply = client.responses.create(
        model="tiny",
        instructions="You are the sound of France.",
        input=[
            {"role": "user", "content": "hello"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "world"}]},  # type: ignore[typeddict-item, list-item]
            *user("What is ", clip, " this"),
        ],
        max_output_tokens=12,
        temperature=0,
        metadata={"kind": "test"},
    )
    chat = chat_answer(
        server,
        [
            {"role": "system", "content": "You are the sound of France."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "world"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is "}, clip, {"type": "text", "text": " this"}],
            },
        ],
        max_tokens=12,
        temperature=0,
    )
    (choice,) = chat["choices"]
    assert reply.output_text == choice["message"]["content"]
    assert reply.status == ("incomplete" if choice["finish_reason"] == "length" else "completed")
    assert (reply.object, reply.metadata, reply.model) == ("response", {"kind": "test"}, "tiny")
    assert reply.usage is not None
    assert reply.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert reply.usage.output_tokens == chat["usage"]["completion_tokens"]


def test_a_stream_tells_the_whole_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "What is the capital", "max_output_tokens": 12}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert kinds[-1] == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].response.output_text == text  # type: ignore[union-attr]
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]


def test_each_event_has_its_name(server: RunningServer) -> None:
    with server.client() as http:
        lines = http.post(PATH, json={"model": "tiny", "input": "hello", "stream": True}).text.split("\n\n")
    assert lines[0].startswith('event: response.created\ndata: {"type":"response.created"')


def test_a_schema(client: openai.OpenAI) -> None:
    reply = client.responses.parse(
        model="tiny", input="hello", text_format=Bird, max_output_tokens=100, temperature=0
    )
    assert isinstance(reply.output_parsed, Bird)
    assert reply.status == "completed"


def test_log_probabilities(client: openai.OpenAI, server: RunningServer) -> None:
    reply = client.responses.create(
        model="tiny",
        input="hello",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        max_output_tokens=6,
    )
    chat = chat_answer(
        server, chat_body("hello")["messages"], max_tokens=6, logprobs=True, top_logprobs=2, temperature=None
    )
    (part,) = reply.output[0].content  # type: ignore[union-attr]
    found = [(entry.token, entry.logprob, len(entry.top_logprobs)) for entry in part.logprobs or ()]  # type: ignore[union-attr]
    expected = chat["choices"][0]["logprobs"]["content"]
    assert found == [(entry["token"], entry["logprob"], 2) for entry in expected]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": user({"type": "input_image", "image_url": "x"})}, "input"),
        ({"input": user({"type": "text", "text": "x"})}, "input."),
        ({"input": [{"role": "tool", "content": "x"}]}, "input."),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"enum": []}}}}, None),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_what_is_refused(server: RunningServer, fields: dict[str, Any], param: str | None) -> None:
    with server.client() as http:
        reply = http.post(PATH, json={"model": "tiny", "input": "hello", **fields})
    assert reply.status_code == 400, reply.text
    assert (reply.json()["error"]["param"] or "").startswith(param or "")
    assert json.dumps(reply.json()["error"]["message"])


def test_thoughts_are_an_item_of_their_own() -> None:
    """Of a thinking model: the order, the text and the events of both, whole and in the smallest pieces."""
    from types import SimpleNamespace

    from audioflamingo.engine.request import Output
    from audioflamingo.server.responses_route import ResponsesReply
    from audioflamingo.server.responses_schema import parse_responses

    text = "<think>it sings</think>a bird"

    def reply_of(pieces: list[str], end_of_prompt: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        request, chat = parse_responses(b'{"model": "tiny", "input": "hello"}')
        prompt: Any = SimpleNamespace(token_ids=[1, 2], num_audio_tokens=0)
        tokenizer: Any = SimpleNamespace(
            encode_plain=lambda text: list(text), decode=lambda ids: end_of_prompt
        )
        reply = ResponsesReply(request, chat, tokenizer)
        reply.add_prompt(prompt)
        events = reply.begin()
        for place, piece in enumerate(pieces):
            is_last = place == len(pieces) - 1
            output = Output(text=piece, token_ids=[1], finish_reason="stop" if is_last else None)
            reply.add(output)
            events += reply.news(output)
        events += reply.end()
        return events[-1]["response"], events

    opened, rest = "<|im_start|>assistant\n<think>\n", text.removeprefix("<think>")
    for pieces, before in (([text], ""), (list(text), ""), ([rest], opened), (list(rest), opened)):
        response, events = reply_of(pieces, before)
        thoughts, message = response["output"]
        assert (thoughts["type"], thoughts["content"][0]["text"]) == ("reasoning", "it sings")
        assert (message["type"], message["content"][0]["text"]) == ("message", "a bird")
        assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len("it sings")
        deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
        assert "".join(deltas) == "it sings"
        done = [event["item"]["type"] for event in events if event["type"] == "response.output_item.done"]
        assert done == ["reasoning", "message"]
