"""How every route of the interface opens: a place inside, a body within its limits, the time for an answer."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from audioflamingo.engine.request import Share
from audioflamingo.server.error_replies import ApiError, ClientGoneError
from audioflamingo.server.replies import unless_gone
from audioflamingo.server.service import Service

SLOWEST_UPLOAD = 10  # times the longest pause
DRAIN_BYTES = 256_000_000  # of a body that is too large, read and dropped so that the client sees the answer


class NamesModel(Protocol):
    """What a request was read into."""

    @property
    def model(self) -> str:
        """The model that it wants."""


Parsed = TypeVar("Parsed", bound=NamesModel)


@dataclass(frozen=True)
class Call:
    """What a route needs to answer a request.

    Attributes:
        scope, receive: of the request.
        send: channel of the reply.
        share: what the request has had of the model.
    """

    scope: Scope
    receive: Receive
    send: Send
    share: Share

    @property
    def arrived(self) -> float:
        """When the request came, by `time.monotonic`."""
        return self.scope["state"]["arrived"]

    async def reply(self, response: Response) -> None:
        """Sends a reply in one piece."""
        await response(self.scope, self.receive, self.send)

    def log(self, **fields: Any) -> None:
        """Adds to the request's line in the log."""
        self.scope["state"]["log"].update(fields)


class ApiRoute(ABC, Generic[Parsed]):
    """A route: how its requests are read and how they are answered.

    Args:
        service: what it works with.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    @abstractmethod
    async def read(self, request: Request) -> Parsed:
        """Reads and checks the body.

        Raises:
            ApiError: what is wrong with it.
        """

    @abstractmethod
    async def answer(self, parsed: Parsed, call: Call) -> None:
        """Sends the reply. Cancelled when the client goes or the time is over."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        service, settings = self.service, self.service.settings
        encoding = Headers(scope=scope).get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            message = f"a body in the encoding {encoding[:40]!r} is not taken; send it as it is."
            raise ApiError(415, message, "unsupported_encoding", headers={"Connection": "close"})
        with service.gate.enter() as place:
            body = LimitedBody(scope, receive, settings.max_upload_bytes, settings.upload_timeout_seconds)
            parsed = await self.read(Request(scope, body))
            service.check_model(parsed.model)
            async with place.time_limit(settings.timeout_seconds):
                await unless_gone(receive, self.answer(parsed, Call(scope, receive, send, place.share)))


class LimitedBody:
    """A request's `receive`, with limits.

    Args:
        scope: of the request.
        receive: its channel.
        max_bytes: largest body.
        pause_s: longest pause between two pieces; the whole may take `SLOWEST_UPLOAD` times as long.
    """

    def __init__(
        self, scope: MutableMapping[str, Any], receive: Receive, max_bytes: int, pause_s: float
    ) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._pause_s = pause_s
        self._end = asyncio.get_running_loop().time() + SLOWEST_UPLOAD * pause_s
        self._num_bytes = 0
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        self._announced = int(lengths[0]) if lengths and lengths[0].isdigit() else 0

    async def __call__(self) -> Message:
        """The next message of the request.

        Raises:
            ApiError: 413 for too many bytes, 408 for too slow an upload.
            ClientGoneError: the client hung up.
        """
        if self._announced > self._max_bytes:
            await self._refuse()
        message = await self._next()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            await self._refuse()
        return message

    async def _next(self) -> Message:
        left_s = self._end - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self._pause_s, left_s)):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "the upload is too slow; try again.", "upload_timeout", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    async def _refuse(self) -> None:
        """Reads on for a while, because a client that is still sending would not see the answer, and refuses."""
        has_more = True
        while has_more and self._num_bytes < DRAIN_BYTES:
            message = await self._next()
            self._num_bytes += len(message.get("body", b""))
            has_more = message.get("more_body", False)
        raise ApiError(
            413,
            f"the request is larger than {self._max_bytes} bytes, the most that this server takes; "
            "send shorter or compressed audio.",
            "request_too_large",
            headers={} if not has_more else {"Connection": "close"},
        )
