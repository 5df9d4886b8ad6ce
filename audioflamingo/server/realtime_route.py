"""`/v1/realtime`: a websocket for speech that is transcribed while it is spoken (OpenAI's transcription sessions)."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from audioflamingo.server.error_replies import ApiError, bad_request, shutting_down
from audioflamingo.server.gate import Place
from audioflamingo.server.realtime_session import LiveSession
from audioflamingo.server.replies import to_json
from audioflamingo.server.service import Service

PROTOCOL = "realtime"
OLD_HEADER, OLD_PROTOCOL = "realtime=v1", "openai-beta.realtime-v1"
OVER, GOING_AWAY = 1000, 1001  # why a socket is closed


class RealtimeRoute:
    """The route.

    Args:
        service: what it works with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection.

        Raises:
            ApiError: why none is opened.
        """
        _check_origin(scope, self._service.settings.cors_origins)
        model = self._read_query(scope)
        protocols = scope.get("subprotocols", ())
        is_old = OLD_PROTOCOL in protocols or OLD_HEADER in Headers(scope=scope).get("openai-beta", "")
        await receive()  # the wish to connect
        with self._service.gate.enter(is_session=True) as place:
            await send(
                {"type": "websocket.accept", "subprotocol": PROTOCOL if PROTOCOL in protocols else None}
            )
            session = LiveSession(self._service, model, _sender(send), place.share, is_old)
            try:
                code = await self._run(session, place, receive)
                if code is not None:
                    await send({"type": "websocket.close", "code": code})
            except OSError:  # the client went while it was told something
                pass
            finally:
                await session.close()
                scope["state"]["log"].update(
                    audio_s=round(session.audio_s, 2), model_s=round(place.share.service_s, 4)
                )

    def _read_query(self, scope: Scope) -> str:
        """The model that the client wants."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        intent = query.get("intent", ["transcription"])[-1]
        if intent != "transcription":
            message = "only intent=transcription is served: nothing is spoken back."
            raise bad_request(message, "intent", "invalid_value")
        model = query.get("model", [self._service.model_name])[-1]
        self._service.check_model(model)
        return model

    async def _run(self, session: LiveSession, place: Place, receive: Receive) -> int | None:
        """Serves a session to its end.

        Returns:
            Why the socket is to be closed; None if the client has closed it.
        """
        limits, gate = self._service.settings, self._service.gate
        try:
            async with place.time_limit(limits.timeout_seconds):
                await session.begin()
                if not await _listen(session, receive, gate.closing):
                    return None
                await session.tell_error(shutting_down())
                await session.finish()
                return GOING_AWAY
        except ApiError as error:
            if error.status != 504:
                raise
            message = f"a session may last {limits.timeout_seconds:g} s; open another."
            await session.tell_error(bad_request(message, code="session_expired"))
            return OVER


async def _listen(session: LiveSession, receive: Receive, closing: asyncio.Event) -> bool:
    """Takes the client's events; True when the server shuts down, False when the client has gone."""
    ending = asyncio.create_task(closing.wait())
    try:
        while True:
            coming = asyncio.ensure_future(receive())
            await asyncio.wait({coming, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return True
            message = coming.result()
            if message["type"] == "websocket.disconnect":
                return False
            text = message.get("text")
            if text is None:
                await session.tell_error(bad_request("send events as JSON text.", code="invalid_value"))
            else:
                await session.handle(text)
    finally:
        ending.cancel()


def _sender(send: Send) -> Any:
    async def send_event(event: dict[str, Any]) -> None:
        await send({"type": "websocket.send", "text": to_json(event).decode("ascii")})

    return send_event


def _check_origin(scope: Scope, allowed: tuple[str, ...]) -> None:
    """Refuses pages of other hosts: a browser opens websockets for any of them, without asking first.

    Raises:
        ApiError: 403.
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    if urlsplit(origin).netloc != headers.get("host"):
        message = f"pages of {origin[:100]!r} may not use this server; its --cors-origin lets them."
        raise ApiError(403, message, "origin_not_allowed")
