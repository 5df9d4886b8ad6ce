"""Runs the HTTP server within a test, on a free port of this machine."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from audioflamingo.server.run_server import Server, build_service
from audioflamingo.server.server_settings import ServerSettings
from audioflamingo.server.service import Service
from tests.support.audio_files import encode, tone

WAIT_S = 60


@dataclass
class RunningServer:
    """A server that answers."""

    url: str
    service: Service
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        """Ends it as a signal would."""
        self.server.handle_exit(15, None)
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()

    def client(self, **options: Any) -> httpx.Client:
        """A plain HTTP client for it."""
        return httpx.Client(base_url=self.url, timeout=WAIT_S, **options)

    def wait_until_heard(self, has_begun: Callable[[], bool], patience_s: float = 1.5) -> None:
        """Waits until the model has begun something and has nothing more to do, or until there is nothing to begin."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end and not (has_begun() and not self.service.worker.engine.has_work):
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        """Waits until nobody is being answered."""
        end = time.monotonic() + WAIT_S
        while self.service.gate.num_inside or self.service.worker.engine.has_work:
            assert time.monotonic() < end, "the server is still busy"
            time.sleep(0.005)


@contextlib.contextmanager
def running_server(model: Any, processor: Any, **settings: Any) -> Iterator[RunningServer]:
    """Starts a server for a model; stops it at the end of the block."""
    options = ServerSettings(**{"port": 0, "cache_tokens": 20000, "shutdown_seconds": 10, **settings})
    service = build_service(model, processor, "tiny", options)
    server = Server(service)
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + WAIT_S
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = RunningServer(f"http://127.0.0.1:{port}", service, server, thread)
    try:
        yield running
    finally:
        running.stop()


def wav(duration_s: float = 1.0) -> bytes:
    """A short file."""
    return encode(tone(duration_s), 16000, "wav")


def audio_part(data: bytes) -> dict[str, Any]:
    """A clip as a part of a message."""
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
    }


def chat_body(*content: Any, **fields: Any) -> dict[str, Any]:
    """A chat request of one user turn; text and parts of content."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 8, **fields}
