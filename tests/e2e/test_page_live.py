"""Live speech on the page: a real browser whose microphone beeps, and a server that answers by script."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright", reason="pip install 'audioflamingo[test]' brings it")

from playwright.sync_api import Page, WebSocketRoute, expect

ITEM = "conversation.item.input_audio_transcription"


class LiveScript:
    """Says some words once sound comes, and all of them when it is committed."""

    def __init__(self) -> None:
        self.sound = b""
        self.url = ""

    def __call__(self, socket: WebSocketRoute) -> None:
        self.url = socket.url
        socket.on_message(lambda message: self.take(socket, json.loads(message)))
        self.tell(socket, "session.created", session={})

    def take(self, socket: WebSocketRoute, event: dict[str, Any]) -> None:
        if event["type"] == "input_audio_buffer.append":
            if not self.sound:
                self.tell(socket, "input_audio_buffer.speech_started", item_id="a", audio_start_ms=62_000)
                self.tell(socket, f"{ITEM}.delta", item_id="a", delta="Good")
                self.tell(socket, f"{ITEM}.delta", item_id="a", delta=" mourning")
            self.sound += base64.b64decode(event["audio"])
        elif event["type"] == "input_audio_buffer.commit":
            self.tell(socket, f"{ITEM}.completed", item_id="a", transcript="Good morning.")

    @staticmethod
    def tell(socket: WebSocketRoute, kind: str, **content: Any) -> None:
        socket.send(json.dumps({"type": kind, **content}))


def test_words_appear_and_are_replaced_by_the_segment(page: Page) -> None:
    script = LiveScript()
    page.route_web_socket("**/v1/realtime?*", script)
    page.get_by_role("button", name="Listen live").click()
    expect(page.locator("#live-partial")).to_have_text("Good mourning")
    page.wait_for_timeout(1500)  # of sound
    page.get_by_role("button", name="Stop listening").click()
    expect(page.locator("#live-segments li")).to_have_text("1:02 Good morning.")
    expect(page.locator("#live-partial")).to_be_hidden()
    expect(page.get_by_role("button", name="Listen live")).to_be_enabled()
    assert "intent=transcription&model=scripted" in script.url
    samples = np.frombuffer(script.sound, "<i2")
    assert len(samples) >= 24000
    assert np.abs(samples).max() > 1000  # the browser's microphone beeps


def test_an_error_is_said_and_the_end_of_the_server_too(page: Page) -> None:
    def refuse(socket: WebSocketRoute) -> None:
        socket.on_message(lambda _: None)
        LiveScript.tell(
            socket, "error", error={"message": "too much at once.", "code": "input_audio_buffer_full"}
        )
        sockets.append(socket)

    sockets: list[WebSocketRoute] = []
    page.route_web_socket("**/v1/realtime?*", refuse)
    page.get_by_role("button", name="Listen live").click()
    notice = page.locator("#live-notice")
    expect(notice).to_contain_text("Too much at once.")
    sockets[0].close(code=1001)
    expect(notice).to_contain_text("The live session ended.")
    expect(page.get_by_role("button", name="Listen live")).to_be_enabled()
