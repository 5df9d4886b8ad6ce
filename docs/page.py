"""Takes docs/page.png, the picture of the page in the README: `python -m docs.page`, at the root of the repository.

All answers in it are the built-in model's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from playwright.sync_api import Page, expect

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from tests.support.browser import running_browser
from tests.support.page_runs import ask
from tests.support.server_runs import running_server

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / "tests" / "data" / "directory_prompt.flac"


def main() -> None:
    """Serves the model, plays a user and takes the picture."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained("nano")
    with running_server(model, processor, served_model_name="nano") as server, running_browser() as browser:
        page = browser.new_page(viewport={"width": 1080, "height": 720})
        page.goto(server.url)
        use(page)
        page.screenshot(path=ROOT / "docs" / "page.png")


def use(page: Page) -> None:
    """Asks about a clip and transcribes it."""
    page.set_input_files("#files", SPEECH)
    for question in ("Does someone speak?", "What is this sound?"):
        ask(page, question)
        expect(page.locator(".turn").last).to_have_attribute("aria-busy", "false")
    page.get_by_role("button", name="Transcribe").click()
    expect(page.get_by_role("button", name="srt")).to_be_visible()
    slider = page.get_by_role("slider")
    for _ in range(5):
        slider.press("ArrowRight")
    page.get_by_label("Your question").focus()
    page.mouse.move(0, 0)


if __name__ == "__main__":
    main()
