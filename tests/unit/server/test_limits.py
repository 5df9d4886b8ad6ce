"""Keys, sizes, times, queues: what a server does with too much, too slow and too many."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from audioflamingo.engine.engine import Engine
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.server_runs import RunningServer, audio_part, chat_body, running_server, wav

CHAT = "/v1/chat/completions"


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error


@contextlib.contextmanager
def blocked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Holds the model still for the length of the block."""
    gate, step = threading.Event(), engine.step

    def wait() -> None:
        gate.wait(30)
        step()

    monkeypatch.setattr(engine, "step", wait)
    try:
        yield
    finally:
        gate.set()


def test_the_key_is_needed_for_the_interface_and_the_metrics(model: Any, processor: Any) -> None:
    with running_server(model, processor, api_key="sésame") as guarded, guarded.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sésame".encode()}):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                reply = client.get(path, headers=headers)  # type: ignore[arg-type]
                assert reply.status_code == 401
                assert error_of(reply)["code"] == "invalid_api_key"
            assert client.post(CHAT, json=chat_body("hello"), headers=headers).status_code == 401  # type: ignore[arg-type]
        assert client.get("/health").status_code == 200
        good = {b"Authorization": "Bearer sésame".encode()}
        assert client.get("/v1/models", headers=good).status_code == 200  # type: ignore[arg-type]


def test_a_large_body_is_refused_by_its_size_before_it_is_parsed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(_: bytes) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr("audioflamingo.server.chat_route.parse_chat", parse)
    body = b'{"model": "' + b"x" * 100_000_000 + b'"}'

    def pieces() -> Any:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]

    with server.client() as client:
        for content in (body, pieces()):  # with a length, and in chunks of unknown number
            reply = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            assert reply.status_code == 413
            assert error_of(reply)["code"] == "request_too_large"
        big = client.post(
            "/v1/audio/transcriptions", files={"file": bytes(2_000_000)}, data={"model": "tiny"}
        )
        assert big.status_code == 413


def test_a_slow_upload_is_cut_off(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
        connection.settimeout(10)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
    with socket.create_connection(
        (host, int(port))
    ) as connection:  # a byte now and then does not help for ever
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000\r\n\r\n".encode())
        connection.settimeout(0.1)
        answer = b""
        end = time.monotonic() + 15
        while not answer and time.monotonic() < end:
            with contextlib.suppress(OSError):
                connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
    server.wait_until_idle()


def test_a_full_queue_is_429_with_retry_after_and_the_queued_are_answered(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(model, processor, max_running=1, max_queue=2) as small, small.client() as client:
        with ThreadPoolExecutor(3) as threads:
            with blocked(small.service.worker.engine, monkeypatch):
                running = []
                for i in range(3):
                    running.append(threads.submit(client.post, CHAT, json=chat_body(f"the {i}")))
                    while small.service.gate.num_inside <= i:
                        time.sleep(0.002)
                reply = client.post(CHAT, json=chat_body("one too many"))
                assert reply.status_code == 429
                assert int(reply.headers["retry-after"]) >= 1
                assert error_of(reply)["type"] == "rate_limit_error"
            assert [future.result().status_code for future in running] == [200, 200, 200]
        assert client.post(CHAT, json=chat_body("hello")).status_code == 200


def test_a_short_request_overtakes_long_ones_that_came_before(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate once let requests in by arrival, so the scheduler's fairness held only for those inside."""
    with (
        running_server(model, processor, max_rows=2, max_running=2, max_queue=8) as fair,
        fair.client() as client,
    ):
        worker, order = fair.service.worker, []

        def ask(name: str, **fields: Any) -> None:
            assert client.post(CHAT, json=chat_body(name, **fields)).status_code == 200
            order.append(name)

        with ThreadPoolExecutor(4) as threads:
            asked = []
            with blocked(worker.engine, monkeypatch):
                for name in ("the long one", "the long two"):
                    fields = {"n": 8, "max_tokens": 150, "frequency_penalty": -2}
                    asked.append(threads.submit(ask, name, **fields))
                while len(worker.engine.scheduler.waiting) + len(worker._arriving) < 16:
                    time.sleep(0.002)
                asked.append(threads.submit(ask, "short"))
                while len(worker.engine.scheduler.waiting) + len(worker._arriving) < 17:
                    time.sleep(0.002)
            for future in asked:
                future.result()
        assert order[0] == "short"


def test_a_request_that_takes_too_long_is_504_and_leaves(model: Any, processor: Any) -> None:
    with running_server(model, processor, timeout_seconds=0.2) as hasty, hasty.client() as client:
        body = chat_body("tool call " * 300, max_tokens=8000, temperature=0, frequency_penalty=-2)
        reply = client.post(CHAT, json=body)
        assert reply.status_code == 504
        assert error_of(reply)["code"] == "timeout"
        hasty.wait_until_idle()
        streamed = client.post(CHAT, json={**body, "stream": True})
        last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "timeout"
        hasty.wait_until_idle()


def test_a_client_that_hangs_up_is_dropped(server: RunningServer) -> None:
    body = chat_body("tool call", max_tokens=8000, frequency_penalty=-2)
    for is_streamed in (False, True):
        steps = server.service.worker.engine.num_steps
        with server.client() as client, contextlib.suppress(httpx.ReadTimeout):
            if is_streamed:
                with client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
                    next(reply.iter_lines())
            else:
                client.post(CHAT, json=body, timeout=0.3)
        server.wait_until_idle()
        assert server.service.worker.engine.num_steps - steps < 8000
    with server.client() as client:
        assert client.post(CHAT, json=chat_body("hello")).status_code == 200
        text = client.get("/metrics").text
    assert f'af3_requests_total{{path="{CHAT}",status="499"}}' in text


def test_a_client_that_hangs_up_in_its_upload_leaves_the_queue(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\n{{".encode())
        while not server.service.gate.num_inside:
            time.sleep(0.002)
    server.wait_until_idle()


def test_shutdown_finishes_whom_the_model_has_begun_with_and_turns_away_who_waits(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running_server(model, processor, max_running=1, max_queue=4) as ending,
        ending.client() as client,
        ThreadPoolExecutor(4) as threads,
    ):
        gate = ending.service.gate
        body = chat_body("tool call", max_tokens=200, frequency_penalty=-2)
        first = threads.submit(client.post, CHAT, json=body)
        while not gate.num_running:
            time.sleep(0.002)
        with blocked(ending.service.worker.engine, monkeypatch):
            waiting = []
            for i, is_streamed in enumerate((False, True, False)):
                waiting.append(threads.submit(client.post, CHAT, json={**body, "stream": is_streamed}))
                while gate.num_inside < i + 2:
                    time.sleep(0.002)
            assert (gate.num_running, gate.num_waiting) == (1, 3)
            ending.server.handle_exit(15, None)
            turned_away = [future.result() for future in waiting]
        reply = first.result()
        assert reply.status_code == 200
        assert reply.json()["usage"]["completion_tokens"] == 200
        for reply in turned_away:
            assert reply.status_code == 503
            assert error_of(reply)["code"] == "shutting_down"
            assert "retry-after" in reply.headers


def test_shutdown_ends_what_does_not_end_itself(model: Any, processor: Any) -> None:
    with (
        running_server(model, processor, shutdown_seconds=0.3) as ending,
        ending.client() as client,
        ThreadPoolExecutor(2) as threads,
    ):
        body = chat_body("tool call", max_tokens=8000, frequency_penalty=-2)
        whole = threads.submit(client.post, CHAT, json=body)
        streamed = threads.submit(client.post, CHAT, json={**body, "stream": True})
        while len(ending.service.worker.engine.scheduler.answering) < 2:
            time.sleep(0.002)
        ending.stop()
        assert whole.result().status_code == 503
        last = json.loads(streamed.result().text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "shutting_down"


def test_a_clip_is_limited_by_its_decoded_length(model: Any, processor: Any) -> None:
    with running_server(model, processor, max_audio_seconds=5) as small, small.client() as client:
        assert (
            client.post(CHAT, json=chat_body(audio_part(wav(2.0)), audio_part(wav(2.5)))).status_code == 200
        )
        reply = client.post(CHAT, json=chat_body(audio_part(wav(3.0)), audio_part(wav(2.5))))
        assert reply.status_code == 400
        assert error_of(reply)["code"] == "audio_too_long"


def test_faults_of_the_server_are_500_without_details(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret path /srv/model")

    with monkeypatch.context() as patch, server.client() as client:
        patch.setattr(AudioFlamingo3Processor, "prompt", broken)
        reply = client.post(CHAT, json=chat_body("hello"), headers={"x-request-id": "my-id.1"})
        assert reply.status_code == 500
        assert reply.headers["x-request-id"] == "my-id.1"
        assert "my-id.1" in error_of(reply)["message"]
        assert "secret" not in reply.text
    with server.client() as client:
        assert client.post(CHAT, json=chat_body("hello")).status_code == 200
