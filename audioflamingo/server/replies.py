"""How replies leave the server: JSON, plain text, server-sent events.

The framing of events stands here and not in a package such as sse-starlette, which, when imported, hooks itself into
uvicorn's shutdown and ends every stream at once, where ours may go on for `shutdown_seconds`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Send

from audioflamingo.server.error_replies import ClientGoneError

Item = TypeVar("Item")

KEEP_ALIVE_S = 15.0  # between two signs of life in a stream, so that proxies do not cut it
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def to_json(content: Any) -> bytes:
    """JSON in ASCII: whatever a client sent can be quoted in it, lone surrogates too."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class JsonResponse(Response):
    """A JSON object."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)


def as_event(content: dict[str, Any]) -> bytes:
    """A JSON object as a server-sent event; one of `/v1/responses` has its type as its name, too."""
    kind = content.get("type") or ""
    name = f"event: {kind}\n".encode() if kind.startswith("response.") else b""
    return name + b"data: " + to_json(content) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
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
        task.result()
    finally:
        await _cancel(task, watcher)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def send_events(send: Send, events: AsyncGenerator[dict[str, Any], None]) -> None:
    """Sends JSON objects as server-sent events, then `[DONE]`.

    The head of the reply leaves with the first event or sign of life: an error before it still has its own status.

    Args:
        send: channel of the reply.
        events: the objects; closed at the end, however it comes.
    """
    is_open = False

    async def put(body: bytes, has_more: bool = True) -> None:
        nonlocal is_open
        if not is_open:
            is_open = True
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
        await send({"type": "http.response.body", "body": body, "more_body": has_more})

    async with aclosing(events), aclosing(with_pauses(events, KEEP_ALIVE_S)) as items:
        async for event in items:
            await put(b": still here\n\n" if event is None else as_event(event))
    await put(b"data: [DONE]\n\n", has_more=False)


async def with_pauses(items: AsyncGenerator[Item, None], pause_s: float) -> AsyncGenerator[Item | None, None]:
    """Yields the items, and None as often as there is none for `pause_s`."""
    while True:
        waiting = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({waiting}, timeout=pause_s))[0]:
                yield None
            item = waiting.result()
        except StopAsyncIteration:
            return
        finally:
            await _cancel(waiting)
        yield item
