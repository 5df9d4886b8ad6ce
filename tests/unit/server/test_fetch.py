"""Addresses in chat requests: off unless allowed, and never to private hosts."""

from __future__ import annotations

from typing import Any

from tests.support.server_runs import RunningServer, chat_body, running_server


def test_through_the_server(server: RunningServer, model: Any, processor: Any) -> None:
    part = {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:1/a.wav"}}
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json=chat_body(part))
        assert reply.status_code == 400
        assert "off on this server" in reply.json()["error"]["message"]
        part["audio_url"] = {"url": "file:///etc/passwd"}
        assert client.post("/v1/chat/completions", json=chat_body(part)).status_code == 400
    with running_server(model, processor, fetch_hosts=("*",)) as open_server, open_server.client() as client:
        part["audio_url"] = {"url": f"{open_server.url}/health"}
        reply = client.post("/v1/chat/completions", json=chat_body(part))
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "url_not_allowed"
