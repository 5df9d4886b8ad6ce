"""Around every request: its id, its key, its log line (one JSON object) and metrics, and errors in one shape."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from audioflamingo.server.error_replies import ApiError, ClientGoneError, as_api_error, internal_error
from audioflamingo.server.metrics import Metrics
from audioflamingo.server.replies import JsonResponse, as_event

logger = logging.getLogger("audioflamingo.server")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY_PROTOCOL = "openai-insecure-api-key."  # as OpenAI's clients in browsers say it
SWITCHED = 101  # to a websocket
CLOSED_BY_FAULT = 1011
NO_HANDSHAKE = "returned without completing handshake"
CLIENT_GONE = 499  # what logs and metrics call a request whose client hung up
PATHS = (
    *("/v1/chat/completions", "/v1/responses", "/v1/audio/transcriptions", "/v1/audio/translations"),
    *("/v1/realtime", "/v1/models", "/health", "/metrics", "/openapi.json"),
)


class RequestMiddleware:
    """Numbers, times, logs and counts requests, and turns what they raise into replies.

    What a route puts into `scope["state"]["log"]` (a dict) is logged with the request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        number = given if GOOD_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        token = request_id.set(number)
        reply = Reply(send, number)
        fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = fields
        start = time.monotonic()
        scope["state"]["arrived"] = start
        try:
            await self._app(scope, receive, reply)
        except ClientGoneError:
            reply.status = CLIENT_GONE
        except asyncio.CancelledError:
            reply.status = reply.status or CLIENT_GONE
            raise
        except Exception as error:
            await self._answer_error(error, scope, receive, reply, number)
        finally:
            self._note(scope, reply.status, time.monotonic() - start, fields)
            request_id.reset(token)

    async def _answer_error(
        self, error: Exception, scope: Scope, receive: Receive, reply: Reply, number: str
    ) -> None:
        found = as_api_error(error)
        if found is None:
            logger.exception("a request failed")
            found = internal_error(number)
        if scope["type"] == "websocket":
            await reply.refuse(found)
            return
        if not reply.status:
            await JsonResponse(found.body, found.status, found.headers)(scope, receive, reply)
            return
        reply.status = found.status  # the head of the reply is out: tell the rest in the stream
        await reply(
            {
                "type": "http.response.body",
                "body": as_event(found.body),
                "more_body": False,
            }
        )

    def _note(self, scope: Scope, status: int, duration_s: float, fields: dict[str, Any]) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.duration.labels(path).observe(duration_s)
        level = logging.ERROR if status >= 500 else logging.INFO
        if path in ("/health", "/metrics") and status < 400:
            level = logging.DEBUG
        log(
            level,
            "request",
            method=scope.get("method", "WEBSOCKET"),
            path=scope["path"][:200],
            status=status,
            duration_ms=round(duration_s * 1000, 1),
            **fields,
        )


class Reply:
    """A request's `send`: adds the request's id and remembers the status."""

    def __init__(self, send: Send, number: str) -> None:
        self._send = send
        self._number = number
        self.status = 0

    async def __call__(self, message: Message) -> None:
        """Sends a message."""
        if message["type"] == "websocket.accept":
            self.status = SWITCHED
            message.setdefault("headers", []).append((b"x-request-id", self._number.encode()))
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._number
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answers an error to whoever wants a websocket, in plain HTTP; an open one is closed."""
        if self.status:
            await self._send({"type": "websocket.close", "code": CLOSED_BY_FAULT})
            return
        self.status = error.status
        response = JsonResponse(error.body, error.status, {**error.headers, "X-Request-Id": self._number})
        start = {"type": "websocket.http.response.start", "status": error.status}
        await self._send({**start, "headers": response.raw_headers})
        await self._send({"type": "websocket.http.response.body", "body": response.body})


class KeyMiddleware:
    """Lets nobody without the key use `/v1` and `/metrics`; the page and `/health` stay open."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "lifespan" and self._digest is not None and _is_guarded(scope):
            given = _given_key(scope)
            if given is None or not hmac.compare_digest(_digest(given.encode("latin-1")), self._digest):
                raise ApiError(
                    401,
                    "send the server's key as 'Authorization: Bearer KEY'.",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
                )
        await self._app(scope, receive, send)


def _is_guarded(scope: Scope) -> bool:
    is_preflight = scope.get("method") == "OPTIONS"
    return not is_preflight and scope["path"].startswith(("/v1", "/metrics"))


def _given_key(scope: Scope) -> str | None:
    """The key that a request brings. A page in a browser can send one with a websocket as a subprotocol only."""
    kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given.strip()
    for name in scope.get("subprotocols", ()):
        if name.startswith(KEY_PROTOCOL):
            return str(name).removeprefix(KEY_PROTOCOL)
    return None


def _digest(key: bytes) -> bytes:
    """Keys are compared by digest: in constant time, whatever their lengths."""
    return hashlib.sha256(key).digest()


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; its `fields` become keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            content["request_id"] = current
        content.update(getattr(record, "fields", {}))
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


def log(level: int, message: str, **fields: Any) -> None:
    """Writes a line with extra keys."""
    logger.log(level, message, extra={"fields": fields})


def set_up_logs(level: str) -> None:
    """Sends this package's and the HTTP server's logs, and warnings, to the error stream as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    logging.getLogger("python_multipart").setLevel(
        logging.ERROR
    )  # it warns of every bad form; the client is told
    # Of every websocket that is refused, which the line of the request says already.
    logging.getLogger("uvicorn.error").addFilter(lambda record: NO_HANDSHAKE not in record.getMessage())
    for name in ("audioflamingo.server", "uvicorn", "py.warnings"):
        target = logging.getLogger(name)
        target.handlers = [handler]
        target.setLevel(level.upper())
        target.propagate = False
