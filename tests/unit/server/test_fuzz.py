"""A little of `python -m tests.support.fuzz` and of `fuzz_live`: no 500, no hang, no crash."""

from __future__ import annotations

import logging

import pytest

from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.fuzz import fuzz_bodies, fuzz_files
from tests.support.fuzz_live import fuzz_sessions
from tests.support.live_speech import count_seconds
from tests.support.scripted_model import ScriptedModel
from tests.support.server_runs import RunningServer, running_server


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_requests(server: RunningServer, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client, caplog.at_level(logging.ERROR, logger="audioflamingo.server"):
        files = fuzz_files(client, "tiny", count=30, seed=seed)
        bodies = fuzz_bodies(client, "tiny", count=15, seed=seed)
    assert sum(files.values()) == 30
    assert [sum(counts.values()) for counts in bodies.values()] == [15] * 4
    assert all(counts[400] > 2 for counts in bodies.values())
    assert caplog.records == []


def test_mutated_events_of_live_sessions(
    processor: AudioFlamingo3Processor, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that went while it was told something, and base64 with half a character, were internal errors."""
    with (
        running_server(ScriptedModel(processor, count_seconds), processor) as server,
        caplog.at_level(logging.ERROR, logger="audioflamingo.server"),
    ):
        counts = fuzz_sessions(server, count=160, seed=1)
    assert counts["gone"] == 2
    assert counts["error"] > 20
    assert counts["updated"] > 2
    assert [record for record in caplog.records if record.name.startswith("audioflamingo")] == []
