"""The served description of the interface: whole, and true of what the server takes and sends."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from starlette.routing import BaseRoute, Mount, Route

from audioflamingo.server.asgi_app import create_app
from audioflamingo.server.chat_schema import ChatRequest
from audioflamingo.server.openapi import FORM, openapi
from audioflamingo.server.responses_schema import ResponsesRequest
from audioflamingo.server.transcription_form import FIELDS, LISTS
from tests.support.server_runs import RunningServer, audio_part, chat_body, wav

DOCUMENT = openapi()


def check(name: str, content: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    Draft202012Validator(schema).validate(content)


def paths_of(routes: list[BaseRoute], prefix: str = "") -> set[str]:
    found = set()
    for route in routes:
        if isinstance(route, Route):
            found.add(prefix + route.path.replace(":path", ""))
        elif isinstance(route, Mount) and route.path:
            found |= paths_of(route.routes, prefix + route.path)
    return found


def test_every_route_is_described_and_no_other(server: RunningServer) -> None:
    assert set(DOCUMENT["paths"]) == paths_of(create_app(server.service).routes)


def test_every_field_is_described_and_no_other() -> None:
    assert set(FORM) == {*FIELDS, *LISTS}
    for body in (ChatRequest, ResponsesRequest):
        fields = DOCUMENT["components"]["schemas"][body.__name__]["properties"]
        assert set(fields) == {field.alias or name for name, field in body.model_fields.items()}


def test_times_of_segments_and_words_may_be_asked_for() -> None:
    """As the form takes them: the description once knew of segments only."""
    Draft202012Validator(FORM["timestamp_granularities"]).validate(["segment", "word"])
    with pytest.raises(ValidationError):
        Draft202012Validator(FORM["timestamp_granularities"]).validate(["letter"])


def test_every_reference_leads_somewhere() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name, schema in schemas.items():
        assert schema, name
        Draft202012Validator.check_schema(schema)

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert references(DOCUMENT) <= {f"#/components/schemas/{name}" for name in schemas}


def test_the_server_says_what_it_serves_without_a_key(server: RunningServer) -> None:
    with server.client() as client:
        reply = client.get("/openapi.json")
    assert reply.status_code == 200
    assert reply.json() == DOCUMENT


def test_requests_and_replies_are_as_described(server: RunningServer) -> None:
    body = chat_body("What is this?", audio_part(wav()), logprobs=True, top_logprobs=2)
    check("ChatRequest", body)
    with pytest.raises(ValidationError, match=r"2\.5"):
        check("ChatRequest", {**body, "temperature": 2.5})
    form = {"model": (None, "tiny"), "file": ("a.wav", wav())}
    with server.client() as client:
        check("Completion", client.post("/v1/chat/completions", json=body).json())
        asked = {"model": "tiny", "input": "What is this?", "max_output_tokens": 8}
        check("ResponsesRequest", asked)
        check("Response", client.post("/v1/responses", json=asked).json())
        for kind, name in (("json", "Transcription"), ("verbose_json", "VerboseTranscription")):
            fields = {**form, "response_format": (None, kind)}
            check(name, client.post("/v1/audio/transcriptions", files=fields).json())
        check("Error", client.post("/v1/chat/completions", json={"model": "tiny"}).json())
        check("Models", client.get("/v1/models").json())
        check("Model", client.get("/v1/models/tiny").json())
        check("Health", client.get("/health").json())
