"""The page at `/` in a real browser, against the real server with a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="pip install 'audioflamingo[test]' brings it")

from playwright.sync_api import Browser, Page, expect

from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.generation_models import lively_model
from tests.support.server_runs import RunningServer, audio_part, running_server
from tests.support.tiny_tokenizer import write_tiny_processor

SPEECH = Path(__file__).parents[1] / "data" / "directory_prompt.flac"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    processor = AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))
    model = lively_model()
    model.generation_config.eos_token_id = [10, 11, 12, 497]
    model.generation_config.max_new_tokens = 40
    with running_server(model, processor) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    page = browser.new_page()
    complaints: list[str] = []
    addresses: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.url)
    yield page
    page.close()
    assert complaints == []
    own = (f"{server.url}/", f"blob:{server.url}/")
    assert [address for address in addresses if not address.startswith(own)] == []


def ask(page: Page, question: str) -> str:
    """Asks, waits for the answer and returns it."""
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    expect(turn.locator("[data-part=question]")).to_have_text(question)
    expect(turn).to_have_attribute("aria-busy", "false")
    return turn.locator("[data-part=answer]").text_content() or ""


def complete(server: RunningServer, messages: list[dict[str, Any]]) -> str:
    """The same answer, without the page."""
    with server.client() as client:
        reply = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    return reply.json()["choices"][0]["message"]["content"]


def test_questions_are_answered_over_several_turns(page: Page, server: RunningServer) -> None:
    expect(page.get_by_label("Model")).to_have_value("tiny")
    page.set_input_files("#files", SPEECH)
    first = {
        "role": "user",
        "content": [audio_part(SPEECH.read_bytes()), {"type": "text", "text": "the sound"}],
    }
    answer = ask(page, "the sound")
    assert answer == complete(server, [first])
    messages = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": "Why"}]
    assert answer
    assert ask(page, "Why") == complete(server, messages)


def test_a_transcript_has_the_segments_and_the_file_of_the_server(page: Page, server: RunningServer) -> None:
    def transcribe(response_format: str) -> Any:
        with server.client() as client:
            return client.post(
                "/v1/audio/transcriptions",
                data={"model": "tiny", "response_format": response_format},
                files={"file": SPEECH.read_bytes()},
            )

    segments = transcribe("verbose_json").json()["segments"]
    assert segments
    page.set_input_files("#files", SPEECH)
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator(".segment span")).to_have_text([segment["text"] for segment in segments])
    with page.expect_download() as download:
        page.get_by_role("button", name="srt").click()
    assert download.value.suggested_filename == "directory_prompt.srt"
    assert download.value.path().read_text() == transcribe("srt").text


def test_a_broken_file_is_explained(page: Page) -> None:
    page.set_input_files(
        "#files", {"name": "broken.wav", "mimeType": "audio/wav", "buffer": b"RIFF" + b"x" * 99}
    )
    expect(page.locator(".clip")).to_contain_text("This browser cannot play the file")
    page.get_by_role("button", name="Transcribe").click()
    notice = page.get_by_role("alert")
    expect(notice).to_be_visible()
    assert "audio" in (notice.text_content() or "").lower()
    expect(page.locator(".clip").get_by_role("button", name="Transcribe")).to_be_visible()


def test_a_stopped_answer_ends_at_the_server(
    page: Page, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that it cannot end by itself before the click.
    monkeypatch.setattr(server.service.generation_config, "max_new_tokens", 5000)
    page.get_by_label("Your question").fill("tool call")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn")).to_contain_text("Stopped.")
    server.wait_until_idle()
    monkeypatch.undo()
    assert ask(page, "the sound")
