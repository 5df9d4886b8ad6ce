"""How replies leave the server: JSON, and server-sent events that end when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from audioflamingo.server.error_replies import ClientGoneError

Result = TypeVar("Result")

KEEP_ALIVE_S = 15.0  # between two signs of life in a stream, so that proxies do not cut it


def to_json(content: Any) -> bytes:
    """JSON in ASCII: whatever a client sent can be quoted in it, lone surrogates too."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class JsonResponse(Response):
    """A JSON object."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Does `work` as long as the client is there. The request's body must have been read.

    Raises:
        ClientGoneError: it hung up, and the work was cancelled.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_until_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel(task, watcher)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def send_events(receive: Receive, send: Send, events: AsyncGenerator[Any, None]) -> None:
    """Sends JSON objects as server-sent events, then `[DONE]`.

    Args:
        receive: channel of the request, whose body has been read.
        send: channel of the reply.
        events: the objects; closed when the client goes.

    Raises:
        ClientGoneError: the client hung up.
    """
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await unless_gone(receive, _send_all(send, events))


async def _send_all(send: Send, events: AsyncGenerator[Any, None]) -> None:
    async with aclosing(events):
        waiting: asyncio.Task[Any] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(_next(events))
                done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S)
                if not done:
                    await _send_part(send, b": still here\n\n")
                    continue
                try:
                    event = waiting.result()
                except StopAsyncIteration:
                    break
                waiting = None
                await _send_part(send, b"data: " + to_json(event) + b"\n\n")
        finally:
            if waiting is not None:
                await _cancel(waiting)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _next(events: AsyncGenerator[Result, None]) -> Awaitable[Result]:
    return events.__anext__()


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def send_text(scope: Scope, receive: Receive, send: Send, text: str, media_type: str) -> None:
    """Sends plain text."""
    await Response(text, media_type=media_type)(scope, receive, send)
