"""Answers of a form through HTTP: `response_format`, and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.support.server_runs import RunningServer, audio_part, chat_body, wav


class Bird(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["owl", "wren"]
    is_loud: bool


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "bird", "strict": True, "schema": schema}}


def text_of(server: RunningServer, **fields: Any) -> str:
    body = chat_body("What is", audio_part(wav()), max_tokens=100, **fields)
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def test_the_official_clients_parse(server: RunningServer) -> None:
    """`parse` sends the schema of a pydantic model and reads the answer into one."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "hello"}], response_format=Bird, max_tokens=100
    )
    assert isinstance(reply.choices[0].message.parsed, Bird)


def test_a_stream(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "hello"}], response_format=Bird, max_tokens=100
    ) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Bird)


def test_each_kind(server: RunningServer) -> None:
    Bird.model_validate_json(text_of(server, response_format=schema_format(Bird.model_json_schema())))
    Bird.model_validate_json(text_of(server, structured_outputs={"json": Bird.model_json_schema()}))
    assert text_of(server, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch("[ab]{3}", text_of(server, structured_outputs={"regex": "[ab]{3}"}))


def test_any_object_begins_as_one(server: RunningServer) -> None:
    body = chat_body("What is", response_format={"type": "json_object"}, max_tokens=1)
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"].startswith("{")
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"response_format": schema_format({"enum": []})}, "anyOf is empty"),
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {}}, "one of the keys"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "exclude"),
    ],
)
def test_what_is_refused(server: RunningServer, fields: dict[str, Any], word: str) -> None:
    with server.client() as client:
        reply = client.post("/v1/chat/completions", content=json.dumps(chat_body("hello", **fields)))
    assert reply.status_code == 400
    assert word in reply.json()["error"]["message"]
