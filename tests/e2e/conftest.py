"""For programs as users write them, a checkpoint folder and a loopback file server; for the page, a browser."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.page_server import PageServer
from tests.support.tiny_model import tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its processor."""
    folder = write_tiny_processor(tmp_path_factory.mktemp("checkpoint"))
    tiny_model(seed=3).save_pretrained(folder)
    return folder


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="session")
def audio_url() -> Iterator[str]:
    """Address under which the recordings of `tests/data` are served."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=DATA)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. It ends with the module: as long as it runs, this thread has an event loop."""
    pytest.importorskip("playwright", reason="pip install 'audioflamingo[test]' brings it")
    from tests.support.browser import CHROMIUM, running_browser

    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with running_browser() as running:
        yield running


@pytest.fixture
def page_server() -> Iterator[PageServer]:
    """The page with answers by script."""
    with PageServer() as running:
        yield running


@pytest.fixture
def page(browser: Any, page_server: PageServer) -> Iterator[Any]:
    """A tab with the page of `page_server`. It may not write a line to the console."""
    page = browser.new_page(permissions=["microphone"])
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(page_server.url)
    page.wait_for_selector("#model > option", state="attached")
    yield page
    page.close()
    # The browser itself writes one for each reply that is an error.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
