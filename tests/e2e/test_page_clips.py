"""Clips on the page: pictures, playing, transcripts, and the ways in. A real browser, answers by script."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

pytest.importorskip("playwright", reason="pip install 'audioflamingo[test]' brings it")

from playwright.sync_api import Page, expect

from tests.support.audio_files import encode, tone
from tests.support.page_runs import RATE, SEGMENTS, ask, clip, expect_said, place, wait_until_behind
from tests.support.page_server import PageServer, Reply, answer, transcript

CANVAS = """(canvas) => {
  const {width, height} = canvas;
  const data = canvas.getContext('2d').getImageData(0, 0, width, height).data;
  const text = Array.from(data, (byte) => String.fromCharCode(byte)).join('');
  return {width, height, data: btoa(text)};
}"""


def picture(page: Page, name: str) -> np.ndarray:
    """The pixels of a canvas: uint8 (height, width, 4)."""
    shown = page.locator(f"canvas.{name}").evaluate(CANVAS)
    return np.frombuffer(base64.b64decode(shown["data"]), np.uint8).reshape(
        shown["height"], shown["width"], 4
    )


def test_the_picture_shows_the_sound(page: Page) -> None:
    page.set_input_files("#files", clip())
    expect(page.get_by_role("slider")).to_be_visible()
    expect(page.locator(".clip")).to_contain_text("0:00 / 0:04")
    waveform = picture(page, "waveform")[..., 3] > 0
    heights = waveform.sum(0) / len(waveform)
    middle = waveform.shape[1] // 2
    assert heights[5 : middle - 5].min() > 0.8
    assert heights[middle + 5 :].max() < 0.1
    brightness = 255 - picture(page, "spectrogram")[..., :3].mean(-1)
    assert brightness[:, middle + 10 :].max() < 5 < brightness[:, : middle - 10].max()
    # 1 kHz is at 35 % of the mel scale up to 8 kHz: 2595 log10(1 + f / 700) gives 1000 of 2840.
    row = brightness[:, 10 : middle - 10].mean(1).argmax()
    assert 1 - row / len(brightness) == pytest.approx(0.35, abs=0.03)
    axis = picture(page, "axis")
    assert (axis[..., 3] > 0).any()


def test_clicks_and_keys_seek(page: Page) -> None:
    page.set_input_files("#files", clip())
    slider = page.get_by_role("slider", name="Position in talk.wav")
    expect(slider).to_be_visible()
    box = slider.bounding_box()
    assert box is not None
    slider.click(position={"x": box["width"] * 0.75, "y": 20})
    assert place(page) == pytest.approx(3, abs=0.1)
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    assert place(page) == pytest.approx(1, abs=0.1)
    slider.press("End")
    assert place(page) == pytest.approx(4, abs=0.1)
    slider.press("Home")
    assert place(page) == 0
    slider.press("Space")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    wait_until_behind(page, 0.05)
    slider.press("Space")
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_segments_appear_as_they_come_and_are_played(page: Page, page_server: PageServer) -> None:
    page.set_input_files("#files", clip())
    first, silent, last = SEGMENTS
    reply = page_server.will_transcribe(transcript(first, None, silent, last))
    page.get_by_role("button", name="Transcribe").click()
    segments = page.get_by_role("list", name="Transcript").get_by_role("button")
    expect(segments).to_have_text(["0:00Good  morning."])
    expect(page.get_by_role("button", name="Stop transcribing")).to_be_visible()
    reply.go.set()
    expect(segments).to_have_text(["0:00Good  morning.", "0:02One --> two."])
    segments.nth(1).click()
    wait_until_behind(page, 2.02)
    expect(segments.nth(1)).to_have_attribute("aria-current", "true")
    expect(segments.nth(0)).not_to_have_attribute("aria-current", "true")


def test_words_come_before_their_times(page: Page, page_server: PageServer) -> None:
    page.set_input_files("#files", clip())
    words = transcript(SEGMENTS[0], None)
    words.events = [
        event for event in words.events if not event or event["type"] != "transcript.text.segment"
    ]
    start, end, text = SEGMENTS[0]
    page_server.will_transcribe(
        words, Reply(whole={"segments": [{"id": 0, "start": start, "end": end, "text": text}]})
    )
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator("[data-part=partial]")).to_have_text("Good morning.")
    words.go.set()
    expect(page.locator(".segment")).to_have_text(["0:00Good  morning."])
    expect(page.locator("[data-part=partial]")).to_be_hidden()


@pytest.mark.parametrize("kind", ["txt", "srt", "json"])
def test_downloads(page: Page, page_server: PageServer, kind: str) -> None:
    page.set_input_files("#files", clip())
    page_server.will_transcribe(transcript(*SEGMENTS))
    page.get_by_role("button", name="Transcribe").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=kind).click()
    assert download.value.suggested_filename == f"talk.{kind}"
    text = download.value.path().read_text()
    if kind == "json":
        segments = [
            {"id": i, "start": start, "end": end, "text": words}
            for i, (start, end, words) in enumerate(SEGMENTS)
        ]
        whole = "Good  morning. One --> two."
        assert json.loads(text) == {"source": "talk.wav", "text": whole, "segments": segments}
    else:
        assert text == {
            "txt": "Good morning.\nOne --> two.\n",
            "srt": "1\n00:00:00,250 --> 00:00:01,500\nGood morning.\n\n"
            "2\n00:00:02,000 --> 00:00:03,500\nOne -> two.\n\n",
        }.get(kind)


def test_a_running_transcription_is_stopped(page: Page, page_server: PageServer) -> None:
    page.set_input_files("#files", clip())
    reply = page_server.will_transcribe(transcript(SEGMENTS[0], None))
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator(".segment")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Transcribe")).to_be_focused()
    assert reply.client_left.wait(10)
    expect(page.locator(".segment")).to_have_count(1)
    expect(page.get_by_role("button", name="srt")).to_be_visible()


def test_a_file_can_be_dropped(page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)>.wav"
    data = page.evaluate_handle(
        """([name, data]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(data)], name, {type: 'audio/wav'}));
          return transfer;
        }""",
        [hostile, list(clip()["buffer"])],
    )
    page.dispatch_event("#drop-zone", "drop", {"dataTransfer": data})
    expect(page.get_by_role("slider")).to_be_visible()
    expect(page.locator(".clip h3")).to_have_text(hostile)
    assert page.locator(".clip img").count() == 0


def test_a_recording_is_sent_as_wav(page: Page, page_server: PageServer) -> None:
    page.get_by_role("button", name="Record").click()
    button = page.get_by_role("button", name="Stop recording")
    expect(button).to_be_focused()
    page.wait_for_timeout(1500)
    button.click()
    expect(page.locator(".clip h3")).to_have_text("recording-1.wav")
    expect(page.get_by_role("slider")).to_be_visible()
    page_server.will_chat(answer("Beeps."))
    ask(page, "What is it?")
    expect_said(page, "Beeps.")
    data = base64.b64decode(page_server.chats()[0]["messages"][0]["content"][0]["input_audio"]["data"])
    assert data[:4] + data[8:16] == b"RIFFWAVEfmt "
    assert [int.from_bytes(data[a:b], "little") for a, b in ((22, 24), (24, 28), (34, 36))] == [1, RATE, 16]
    samples = np.frombuffer(data[44:], np.int16)
    assert len(samples) > RATE // 2
    assert np.abs(samples).max() > 1000  # the browser's microphone beeps


def test_a_large_file_is_sent_as_the_model_hears_it(page: Page, page_server: PageServer) -> None:
    large = encode(tone(11.0, rate=96000, channels=2), 96000, "wav_float")
    assert len(large) > 8_000_000
    page.set_input_files("#files", {"name": "large.wav", "mimeType": "audio/wav", "buffer": large})
    page_server.will_transcribe(transcript(*SEGMENTS))
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator(".segment")).to_have_count(2)
    ((_, _, body),) = page_server.bodies
    start = body.index(b"RIFF")
    assert int.from_bytes(body[start + 24 : start + 28], "little") == RATE
    assert int.from_bytes(body[start + 40 : start + 44], "little") == pytest.approx(11 * RATE * 2, abs=10)
