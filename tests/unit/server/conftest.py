"""One model and one server for the tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.generation_models import lively_model
from tests.support.server_runs import RunningServer, running_server
from tests.support.tiny_tokenizer import write_tiny_processor


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    """The tiny processor."""
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def model() -> Any:
    """A tiny model whose answers vary and end."""
    model = lively_model()
    model.generation_config.eos_token_id = [10, 11, 12, 497]
    return model


@pytest.fixture(scope="session")
def server(model: Any, processor: AudioFlamingo3Processor) -> Iterator[RunningServer]:
    """A server with the default limits, but small."""
    with running_server(model, processor, max_upload_mb=1.0, upload_timeout_seconds=0.5) as running:
        yield running
