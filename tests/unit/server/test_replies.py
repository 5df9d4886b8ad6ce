"""Server-sent events: framing, signs of life, errors, and clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from audioflamingo.server import replies
from audioflamingo.server.error_replies import ClientGoneError, shutting_down

Event = dict[str, Any]


class Wire:
    """What a client has got so far."""

    def __init__(self) -> None:
        self.messages: list[MutableMapping[str, Any]] = []

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def test_events_are_framed_and_a_stream_ends_with_done() -> None:
    async def events() -> AsyncGenerator[Event, None]:
        yield {"text": "a\nb\ud800"}
        yield {"n": 2}

    wire = Wire()
    asyncio.run(replies.send_events(wire.send, events()))
    assert wire.messages[0]["status"] == 200
    assert dict(wire.messages[0]["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert wire.body == b'data: {"text":"a\\nb\\ud800"}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    assert [message["more_body"] for message in wire.messages[1:]] == [True, True, False]


def test_a_pause_is_filled_with_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.01)
    wire = Wire()

    async def events() -> AsyncGenerator[Event, None]:
        while wire.body.count(b": still here\n\n") < 3:
            await asyncio.sleep(0.001)
        yield {}

    asyncio.run(replies.send_events(wire.send, events()))
    parts = wire.body.split(b"\n\n")
    assert set(parts[:-3]) == {b": still here"}
    assert parts[-3:] == [b"data: {}", b"data: [DONE]", b""]


def test_an_error_before_the_first_event_leaves_the_head_to_others() -> None:
    async def events() -> AsyncGenerator[Event, None]:
        if True:
            raise shutting_down()
        yield {}

    wire = Wire()
    with pytest.raises(Exception, match="shutting down"):
        asyncio.run(replies.send_events(wire.send, events()))
    assert wire.messages == []


def test_a_client_that_hangs_up_closes_what_gives_the_events() -> None:
    wire = Wire()
    is_closed = False

    async def events() -> AsyncGenerator[Event, None]:
        nonlocal is_closed
        try:
            yield {"n": 1}
            await asyncio.sleep(60)
        finally:
            is_closed = True

    async def receive() -> MutableMapping[str, Any]:
        while not wire.body:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        asyncio.run(replies.unless_gone(receive, replies.send_events(wire.send, events())))
    assert is_closed
    assert wire.body == b'data: {"n":1}\n\n'
