"""A checkpoint folder and a loopback file server for programs as users write them."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_model import tiny_model
from tests.tiny_tokenizer import write_tiny_processor

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
