"""The page without a mouse, on a narrow screen, in light and dark. A real browser, answers by script."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("playwright", reason="pip install 'audioflamingo[test]' brings it")

from playwright.sync_api import Browser, Page, expect

from tests.support.page_runs import SEGMENTS, ask, clip, expect_said, place, wait_until_behind
from tests.support.page_server import PageServer, answer, refusal, transcript


def test_the_keyboard_is_enough(page: Page, page_server: PageServer) -> None:
    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            field = page.evaluate("getComputedStyle(document.activeElement.parentElement).outlineStyle")
            assert (style, field) != ("none", "none"), "the focus cannot be seen"
            label = page.evaluate(
                "document.activeElement.ariaLabel ?? document.activeElement.labels?.[0]?.textContent"
                " ?? document.activeElement.textContent"
            )
            if label.strip() == name:
                return
        raise AssertionError(f"the tab key does not lead to {name!r}")

    # The driver takes over choosers a moment after it is told to, which would be too late for the first.
    page.on("filechooser", lambda _: None)
    tab_to("Skip to the question")
    tab_to("New conversation")
    tab_to("Choose files")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(clip())
    tab_to("Record")
    expect(page.get_by_role("slider")).to_be_visible()
    tab_to("Remove talk.wav")
    tab_to("Position in talk.wav")
    page.keyboard.press("ArrowRight")
    assert place(page) == pytest.approx(1, abs=0.1)
    tab_to("Play")
    tab_to("Transcribe")
    page_server.will_transcribe(transcript(*SEGMENTS))
    page.keyboard.press("Enter")
    expect(page.locator(".segment")).to_have_count(2)
    expect(page.get_by_role("button", name="Transcribe")).to_be_focused()
    tab_to("0:00Good  morning.")
    tab_to("0:02One --> two.")
    page.keyboard.press("Enter")
    wait_until_behind(page, 2.02)
    tab_to("srt")
    tab_to("Your question")
    page_server.will_chat(answer("It is", None), answer("A tone."))
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("it?")
    page.keyboard.press("Enter")
    expect_said(page, "It is")
    page.keyboard.press("Escape")
    expect_said(page, "It is Stopped.")
    assert page_server.chats()[0]["messages"][0]["content"][1]["text"] == "What is\nit?"
    page.keyboard.type("And now?")
    page.keyboard.press("Enter")
    expect_said(page, "A tone.")


# The contrast of each text with what is behind it (WCAG 2.2), as [contrast, text].
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if ((colour[3] ?? 1) === 1) return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const [a, b] = [numbers(getComputedStyle(element).color), behind(element)].map(luminance);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_in_light_and_dark(browser: Browser, page_server: PageServer, scheme: Any) -> None:
    screen: Any = {"width": 360, "height": 740}
    page = browser.new_page(viewport=screen, color_scheme=scheme, reduced_motion="reduce")
    page.goto(page_server.url)
    page.set_input_files("#files", clip("a-name-without-any-space-that-is-longer-than-the-screen.wav"))
    page_server.will_transcribe(transcript((0, 1, "Donaudampfschifffahrtsgesellschaft" * 3)))
    page.get_by_role("button", name="Transcribe").click()
    expect(page.locator(".segment")).to_have_count(1)
    page.locator(".segment").click()
    page_server.will_chat(
        answer("x" * 200, finish_reason="length"), refusal(400, "y" * 100), answer("A", None)
    )
    for question in ("z" * 100, "second", "third"):
        ask(page, question)
        expect(page.locator(".turn").last.get_by_text(question)).to_be_visible()
        if question != "third":
            expect(page.locator(".turn").last).to_have_attribute("aria-busy", "false")
    # The newest line is above the question field.
    bottom = page.locator(".turn").last.bounding_box()
    field = page.locator("#ask").bounding_box()
    assert bottom is not None
    assert field is not None
    assert bottom["y"] < field["y"] < screen["height"]
    assert page.evaluate("document.documentElement.scrollWidth") == screen["width"]
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert [(text, contrast) for contrast, text in contrasts if contrast < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, background[4:-1].split(","))) < 60) == (scheme == "dark")
    assert page.evaluate("document.getAnimations().length") == 0
    page.close()
