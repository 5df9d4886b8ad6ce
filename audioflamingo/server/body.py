"""Reads request bodies, within limits of size and time: what is too large or too slow never reaches a parser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from audioflamingo.server.error_replies import ApiError, ClientGoneError, bad_request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

SLOWEST_UPLOAD = 10  # times the longest pause
DRAIN_BYTES = 256_000_000  # of a body that is too large, read and dropped so that the client sees the answer
MAX_FIELDS = 64


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


async def read_body(receive: Receive) -> bytes:
    """The whole body."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses a JSON object. Costs time for large bodies: not for the event loop.

    Raises:
        ApiError: 400 if it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise bad_request("the JSON is nested too deeply.") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise bad_request(f"the body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object.")
    return content


async def read_form(request: Request, receive: Receive, max_bytes: int) -> FormData:
    """Reads a multipart form. Files stay in memory: nothing is written to disk.

    Raises:
        ApiError: 400 if it is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise bad_request("send the audio as multipart/form-data, with a part named 'file'.")
    parser = WholeFormParser(
        request.headers,
        Request(request.scope, receive).stream(),
        max_files=MAX_FIELDS,
        max_fields=MAX_FIELDS,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(f"the form cannot be read: {error.message}") from None
    except (LookupError, ValueError) as error:  # an unknown charset, bytes that are not in it
        raise bad_request(f"the form cannot be read: {error!r}") from None
    if not parser.is_whole:
        await form.close()
        raise bad_request("the form ends in the middle of a part; send all of it.")
    return form


class WholeFormParser(MultiPartParser):
    """Knows whether it saw the end of the form; Starlette's takes half a file for a whole one."""

    is_whole = False

    def on_end(self) -> None:
        """Called at the last boundary."""
        self.is_whole = True
