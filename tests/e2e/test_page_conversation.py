"""Questions and answers on the page, and all that can go wrong. A real browser, answers by script."""

from __future__ import annotations

import base64
from typing import Any

import pytest

pytest.importorskip("playwright", reason="pip install 'audioflamingo[test]' brings it")

from playwright.sync_api import Page, expect

from tests.support.page_runs import ask, clip, expect_said
from tests.support.page_server import PageServer, answer, refusal


def test_an_answer_grows_and_the_next_question_carries_it(page: Page, page_server: PageServer) -> None:
    files = [clip(), clip("noise.wav", 2.0)]
    page.set_input_files("#files", files)
    expect(page.locator("#attached")).to_have_text("Goes with your question: talk.wav, noise.wav")
    reply = page_server.will_chat(answer("A to", None, "ne.\nThen <b>silence</b>."))
    ask(page, "What is it?")
    expect_said(page, "A to")
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "true")
    reply.go.set()
    whole = "A tone.\nThen <b>silence</b>."
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "false")
    assert page.locator("[data-part=answer]").text_content() == whole
    expect(page.locator("#attached")).to_be_hidden()
    page_server.will_chat(answer("Yes.", finish_reason="length"))
    ask(page, "Sure?")
    expect_said(page, "Yes. The answer was cut at its greatest length.")
    sounds = [
        {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(f["buffer"]).decode(), "format": "wav"},
        }
        for f in files
    ]
    first = {"role": "user", "content": [*sounds, {"type": "text", "text": "What is it?"}]}
    follow_up = [first, {"role": "assistant", "content": whole}, {"role": "user", "content": "Sure?"}]
    assert page_server.chats() == [
        {"model": "scripted", "stream": True, "messages": messages} for messages in ([first], follow_up)
    ]


def test_thoughts_are_dimmed_and_no_part_of_the_conversation(page: Page, page_server: PageServer) -> None:
    reply = answer("Woof.")
    thought = {
        "choices": [{"index": 0, "delta": {"reasoning_content": "A <i>dog</i>."}, "finish_reason": None}]
    }
    reply.events.insert(1, thought)
    page_server.will_chat(reply, answer("Yes."))
    ask(page, "What is it?")
    expect_said(page, "A <i>dog</i>.\n\nWoof.")
    colors = [
        page.locator(f".turn [data-part={name}]").evaluate("(element) => getComputedStyle(element).color")
        for name in ("thoughts", "answer")
    ]
    assert colors[0] != colors[1]
    ask(page, "Sure?")
    expect_said(page, "Yes.")
    expect(page.locator(".turn").last.locator("[data-part=thoughts]")).to_be_hidden()
    assert page_server.chats()[1]["messages"][1] == {"role": "assistant", "content": "Woof."}


def test_a_new_conversation_keeps_the_clips_and_a_removed_one_is_not_sent(
    page: Page, page_server: PageServer
) -> None:
    page.set_input_files("#files", [clip(), clip("noise.wav", 2.0)])
    page_server.will_chat(answer("One."), answer("Two."), answer("Three."))
    ask(page, "first")
    expect_said(page, "One.")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "second")
    expect_said(page, "Two.")
    page.get_by_role("button", name="Remove talk.wav").click()
    expect(page.locator(".clip")).to_have_count(1)
    ask(page, "third")
    expect_said(page, "Three.")
    kinds = [
        [part["type"] for part in message["content"]] if message["role"] == "user" else "assistant"
        for chat in page_server.chats()
        for message in chat["messages"][:1]
    ]
    both = ["input_audio", "input_audio", "text"]
    assert kinds == [both, both, ["input_audio", "text"]]
    assert len(page_server.chats()[1]["messages"]) == 1


@pytest.mark.parametrize("way", ["button", "key"])
def test_a_running_answer_is_stopped(page: Page, page_server: PageServer, way: str) -> None:
    reply = page_server.will_chat(answer("It is", None, " never said."))
    ask(page, "What is it?")
    expect_said(page, "It is")
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect_said(page, "It is Stopped.")
    expect(page.get_by_label("Your question")).to_be_focused()
    assert reply.client_left.wait(10)
    page_server.will_chat(answer("A tone."))
    ask(page, "Go on.")
    expect_said(page, "A tone.")
    assert page_server.chats()[1]["messages"][1] == {"role": "assistant", "content": "It is"}


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (refusal(400, "the clip is empty."), "The clip is empty."),
        (refusal(429, "full", {"Retry-After": "3"}), "The server is busy. Try again in 3 seconds."),
        (refusal(429, "full"), "The server is busy. Try again in a moment."),
        (refusal(500, "the server failed"), "The server failed."),
    ],
)
def test_refusals_are_told_and_can_be_tried_again(
    page: Page, page_server: PageServer, reply: Any, text: str
) -> None:
    page_server.will_chat(reply, answer("A tone."))
    ask(page, "What is it?")
    expect(page.get_by_role("alert").locator("p")).to_have_text(text)
    page.get_by_role("button", name="Try again").click()
    expect_said(page, "A tone.")
    assert page_server.chats()[0] == page_server.chats()[1]


def test_an_error_in_the_middle_and_a_cut_connection_are_told(page: Page, page_server: PageServer) -> None:
    broken, cut = answer("A to"), answer("A to")
    broken.events[-1] = {"error": {"message": "the model stopped."}}
    cut.is_whole = False
    page_server.will_chat(broken, cut, answer("Well."))
    ask(page, "What is it?")
    expect(page.get_by_role("alert").locator("p")).to_have_text("The model stopped.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The connection ended before the answer did")
    page.get_by_role("button", name="Try again").click()
    expect_said(page, "Well.")


def test_a_server_that_cannot_be_reached(page: Page, page_server: PageServer) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    ask(page, "What is it?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.unroute("**/v1/chat/completions")
    page_server.will_chat(answer("A tone."))
    page.get_by_role("button", name="Try again").click()
    expect_said(page, "A tone.")


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, page_server: PageServer) -> None:
    page_server.key = "open sesame"
    page_server.will_chat(answer("A tone."))
    ask(page, "What is it?")
    field = page.get_by_label("This server asks for an API key.")
    expect(field).to_be_focused()
    # The name of the model is known already: the question itself finds out that the key is wrong.
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    field = page.get_by_label("That key was not accepted.")
    expect(field).to_be_focused()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("[data-part=answer]")).to_have_text("A tone.")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("scripted")
    expect(page.locator("#key-form")).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_a_suggestion_becomes_the_question(page: Page, page_server: PageServer) -> None:
    suggestion = page.locator("#suggestions button").first
    text = suggestion.text_content()
    suggestion.click()
    expect(page.get_by_label("Your question")).to_be_focused()
    page_server.will_chat(answer("Yes."))
    page.keyboard.press("Enter")
    expect_said(page, "Yes.")
    assert page_server.chats()[0]["messages"] == [{"role": "user", "content": text}]
    expect(suggestion).to_be_hidden()
