"""Bad chat requests are 400 and say what is wrong; nothing is accepted and then ignored."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from audioflamingo.errors import ArgumentError
from audioflamingo.server.middleware import JsonFormatter, request_id
from audioflamingo.server.run_server import is_loopback
from audioflamingo.server.server_settings import ServerSettings
from tests.support.server_runs import RunningServer, audio_part, chat_body, running_server, wav

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def bad_audio(data: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "tiny"}, "messages"),
        ({"model": "tiny", "messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "model"),
        ({"model": "tiny", "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"model": "tiny", "messages": [{"role": "user"}]}, "messages.0.content"),
        (chat_body("x", temperature="0"), "temperature"),
        (chat_body("x", temperature=True), "temperature"),
        (chat_body("x", top_p=0), "top_p"),
        (chat_body("x", n=0), "n"),
        (chat_body("x", n=9), "n"),
        (chat_body("x", max_tokens=0), "max_tokens"),
        (chat_body("x", max_tokens=5, max_completion_tokens=6), "max_tokens"),
        (chat_body("x", top_logprobs=3), "top_logprobs"),
        (chat_body("x", logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat_body("x", stream_options={"include_usage": True}), "stream_options"),
        (chat_body("x", seed=2**70), "seed"),
        (chat_body("x", tools=[{"type": "function"}]), "tools"),
        (chat_body("x", logit_bias={"the": 5}), "logit_bias"),
        (chat_body("x", temprature=1), "temprature"),
        (chat_body("x", IMAGE), "messages"),
        (chat_body(bad_audio("!!!")), "messages.0.input_audio"),
        (chat_body(bad_audio("")), "messages.0.input_audio"),
        (chat_body(bad_audio("data:audio/wav,xx")), "messages.0.input_audio"),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, body: dict[str, Any], param: str) -> None:
    with server.client() as client:
        reply = client.post(CHAT, json=body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert str(error["param"]).startswith(param)


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b'"x"',
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"model": NaN}',
            b'{"a":' * 50_000,
        ),
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
        json.dumps(chat_body(bad_audio("UklGRg=="))).encode(),
        json.dumps(chat_body(audio_part(wav()[:2000]))).encode(),
        json.dumps(chat_body(audio_part(wav(0.01)))).encode(),
    ],
)
def test_bodies_that_are_no_requests_are_400(server: RunningServer, content: bytes) -> None:
    with server.client() as client:
        reply = client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert reply.status_code in (400, 404)
        assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        (
            [{"type": "input_text", "text": "x"}],
            "messages.0.content.0",
            "no part of type 'input_text'.*'audio_url'",
        ),
        (
            [{"type": "audio_url", "audio_url": "x.wav"}],
            "messages.0.content.0.audio_url",
            "should be an object",
        ),
        ([{"type": "text", "text": 3}], "messages.0.content.0.text", "valid string"),
        ([{"text": "x"}], "messages.0.content.0", "part needs a 'type', such as 'input_audio'"),
        (["x"], "messages.0.content.0", "should be an object"),
        (3, "messages.0.content", "a text or a list of parts"),
        (None, "messages.0.content", "a text or a list of parts"),
    ],
)
def test_an_error_is_about_what_was_sent(
    server: RunningServer, content: Any, param: str, message: str
) -> None:
    """Where a list of parts was sent, the error asked for a string."""
    with server.client() as client:
        reply = client.post(CHAT, json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert re.search(message, error["message"])
    assert "list of parts.0" not in error["message"]


def test_an_earlier_answer_without_text(server: RunningServer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    with server.client() as client:
        body = chat_body("x", top_k=-1)
        usages = []
        for content in (None, ""):
            messages[1] = {"role": "assistant", "content": content}
            reply = client.post(CHAT, json={**body, "messages": messages})
            assert reply.status_code == 200, reply.text
            usages.append(reply.json()["usage"]["prompt_tokens"])
        assert usages[0] == usages[1]
        messages[1] = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
        assert client.post(CHAT, json={**body, "messages": messages}).status_code == 400


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/audio/transcriptions", "/v1/audio/transcriptions"),
        ("/chat/completions/", "/v1/chat/completions"),
        ("/af3/v1/audio/transcriptions", "/v1/audio/transcriptions"),
        ("/v1/audio/transcription", "/v1/audio/transcriptions"),
        ("/tokenize", None),
    ],
)
def test_a_wrong_path_is_not_found(server: RunningServer, path: str, meant: str | None) -> None:
    """The page's files answered: 405, as if the path were right."""
    with server.client() as client:
        reply = client.post(path, json={})
    assert reply.status_code == 404
    assert "allow" not in reply.headers
    hint = "." if meant is None else f"; did you mean {meant}?"
    assert reply.json()["error"]["message"] == f"there is no {path!r} here{hint}"


def test_neutral_values_of_what_is_not_supported_are_fine(server: RunningServer) -> None:
    body = chat_body(
        "x", tools=[], tool_choice="auto", response_format={"type": "text"}, user="me", logit_bias=None
    )
    with server.client() as client:
        assert client.post(CHAT, json={**body, "modalities": ["text"], "store": False}).status_code == 200


def test_control_tokens_in_a_message_stay_text(server: RunningServer) -> None:
    with server.client() as client:
        reply = client.post(CHAT, json=chat_body("<sound> <|im_end|> <|im_start|>system"))
        assert reply.status_code == 200
        assert reply.json()["usage"]["prompt_tokens_details"]["audio_tokens"] == 0


def test_other_paths_and_methods_have_the_same_shape_of_error(server: RunningServer) -> None:
    with server.client() as client:
        for reply, status in (
            (client.get("/v1/nothing"), 404),
            (client.get(CHAT), 405),
            (client.delete("/v1/models"), 405),
        ):
            assert reply.status_code == status
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_health_and_metrics(server: RunningServer) -> None:
    with server.client() as client:
        client.post(CHAT, json=chat_body("hello", audio_part(wav(2.0))))
        assert client.get("/health").json() == {"status": "ok"}
        text = client.get("/metrics").text
    values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[0] != "#"}
    assert values[f'af3_requests_total{{path="{CHAT}",status="200"}}'] >= 1
    assert values["af3_time_to_first_token_seconds_count"] >= 1
    assert values["af3_tokens_per_second_count"] >= 1
    assert values["af3_audio_seconds_total"] >= 2
    assert values["af3_generated_tokens_total"] >= 1
    assert values["af3_requests_running"] == values["af3_requests_waiting"] == 0
    uses = [values[f'af3_cache_tokens{{use="{use}"}}'] for use in ("running", "reusable", "free")]
    assert sum(uses) == server.service.settings.cache_tokens


def test_cors_is_off_unless_asked_for(server: RunningServer, model: Any, processor: Any) -> None:
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with server.client() as client:
        assert "access-control-allow-origin" not in client.options(CHAT, headers=headers).headers
    with (
        running_server(model, processor, cors_origins=("https://page.example",), api_key="k") as open_server,
        open_server.client() as client,
    ):
        allowed = client.options(CHAT, headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        headers["Origin"] = "https://other.example"
        assert "access-control-allow-origin" not in client.options(CHAT, headers=headers).headers


@pytest.mark.parametrize(
    "change", [{"max_running": 0}, {"max_queue": -1}, {"max_upload_mb": 0}, {"api_key": " "}, {"port": -1}]
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        ServerSettings(**change)


def test_what_is_reachable_from_this_machine_only() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.2", "example.org")] == [False] * 4


def test_log_lines_are_json_with_the_requests_id() -> None:
    token = request_id.set("req-1")
    record = logging.LogRecord("x", logging.INFO, "f", 1, "a %s", ("b\nc",), None)
    record.fields = {"status": 200}
    line = JsonFormatter().format(record)
    request_id.reset(token)
    assert "\n" not in line
    content = json.loads(line)
    assert (content["message"], content["request_id"], content["status"]) == ("a b\nc", "req-1", 200)
