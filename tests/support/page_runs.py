"""What tests of the page do with it."""

from __future__ import annotations

from typing import Any

import numpy as np
from playwright.sync_api import Page, expect

from tests.support.audio_files import encode

RATE = 16000
SEGMENTS = ((0.25, 1.5, "Good  morning."), (1.5, 2.0, ""), (2.0, 3.5, "One --> two."))


def clip(name: str = "talk.wav", duration_s: float = 4.0) -> dict[str, Any]:
    """A file to choose: 1 kHz in its first half, silence in the second."""
    time = np.arange(round(duration_s * RATE)) / RATE
    waveform = np.where(time < duration_s / 2, 0.5 * np.sin(2 * np.pi * 1000 * time), 0)[:, None]
    return {"name": name, "mimeType": "audio/wav", "buffer": encode(waveform.astype(np.float32), RATE, "wav")}


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def expect_said(page: Page, text: str) -> None:
    """Waits for what is seen behind the newest question."""
    expect(page.locator(".turn").last.locator(".answer")).to_have_text(text, use_inner_text=True)


def place(page: Page) -> float:
    """Seconds at which the clip is."""
    return float(page.get_by_role("slider").get_attribute("aria-valuenow") or "nan")


def wait_until_behind(page: Page, seconds: float) -> None:
    """Waits until the clip has been played that far."""
    page.evaluate(
        """(seconds) => new Promise((resolve, reject) => {
          const look = () => document.querySelector('audio').currentTime > seconds && resolve();
          setInterval(look, 20);
          setTimeout(() => reject(new Error('it does not play')), 10000);
        })""",
        seconds,
    )
