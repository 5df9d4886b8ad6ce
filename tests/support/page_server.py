"""A server for tests of the page: the files of the page, and answers by script, as the HTTP interface words them."""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import audioflamingo.server

PAGE = Path(audioflamingo.server.__file__).parent / "page"
MODELS = {"object": "list", "data": [{"id": "scripted", "object": "model", "created": 0, "owned_by": "test"}]}


@dataclass
class Reply:
    """One reply of the script.

    Attributes:
        events: what is streamed, as JSON objects; None in the place of one holds the stream there until the test
            sets `go` or the client hangs up.
        whole: sent in place of a stream: a JSON object, with `status`.
        is_whole: whether `[DONE]` follows.
    """

    events: list[dict[str, Any] | None] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Any] | None = None
    is_whole: bool = True
    go: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)


def answer(*texts: str | None, finish_reason: str = "stop") -> Reply:
    """A chat reply that grows by each text; None: see `Reply.events`."""

    def chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    pieces = [None if text is None else chunk({"content": text}) for text in texts]
    return Reply([chunk({"role": "assistant", "content": ""}), *pieces, chunk({}, finish_reason)])


def transcript(*segments: tuple[float, float, str] | None) -> Reply:
    """A transcription of (start, end, text); None: see `Reply.events`."""
    events: list[dict[str, Any] | None] = []
    for i, segment in enumerate(segments):
        if segment is None:
            events.append(None)
            continue
        start, end, text = segment
        times = {"id": i, "start": start, "end": end, "text": text}
        events.append({"type": "transcript.text.segment", **times})
        events.append({"type": "transcript.text.delta", "delta": f" {text}"})
    return Reply([*events, {"type": "transcript.text.done", "text": "", "usage": {}}])


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Reply:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": "test"}
    return Reply(status=status, whole={"error": error}, headers=headers or {})


class PageServer:
    """The server; a context manager.

    Attributes:
        url: its address.
        replies: by path, in the order in which they are given.
        bodies: what was posted, as (path, headers, body).
        key: an API key that `/v1` asks for.
    """

    def __init__(self) -> None:
        self.replies: dict[str, list[Reply]] = {"/v1/chat/completions": [], "/v1/audio/transcriptions": []}
        self.bodies: list[tuple[str, dict[str, str], bytes]] = []
        self.key: str | None = None
        handler = type("Handler", (_Handler,), {"script": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=PAGE))
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def chats(self) -> list[dict[str, Any]]:
        """The bodies of the chat requests."""
        return [json.loads(body) for path, _, body in self.bodies if path.endswith("completions")]

    def will_chat(self, *replies: Reply) -> Reply:
        """Adds replies for chat requests; returns the last."""
        self.replies["/v1/chat/completions"].extend(replies)
        return replies[-1]

    def will_transcribe(self, *replies: Reply) -> Reply:
        """Adds replies for transcriptions; returns the last."""
        self.replies["/v1/audio/transcriptions"].extend(replies)
        return replies[-1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for replies in self.replies.values():
            for reply in replies:
                reply.go.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    script: PageServer

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            super().do_GET()
        elif self._is_let_in():
            self._send_json(200, MODELS)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.script.bodies.append((self.path, dict(self.headers), body))
        if not self._is_let_in():
            return
        reply = self.script.replies[self.path].pop(0)
        if reply.whole is not None:
            self._send_json(reply.status, reply.whole, reply.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(reply)
        except OSError:
            reply.client_left.set()

    def _stream(self, reply: Reply) -> None:
        for event in reply.events:
            if event is not None:
                self._send_data(json.dumps(event))
                continue
            while not reply.go.wait(0.02):
                self.wfile.write(b": still here\n\n")
        if reply.is_whole:
            self._send_data("[DONE]")

    def _send_data(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _is_let_in(self) -> bool:
        if self.script.key is None or self.headers["Authorization"] == f"Bearer {self.script.key}":
            return True
        self._send_json(401, {"error": {"message": "send the key."}})
        return False

    def _send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
