"""A little of `python -m tests.support.fuzz`: mutated files and bodies never end in a 500, a hang or a crash."""

from __future__ import annotations

import logging

import pytest

from tests.support.fuzz import fuzz_bodies, fuzz_files
from tests.support.server_runs import RunningServer


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_requests(server: RunningServer, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client, caplog.at_level(logging.ERROR, logger="audioflamingo.server"):
        files = fuzz_files(client, "tiny", count=30, seed=seed)
        bodies = fuzz_bodies(client, "tiny", count=15, seed=seed)
    assert sum(files.values()) == 30
    assert [sum(counts.values()) for counts in bodies.values()] == [15] * 4
    assert all(counts[400] > 2 for counts in bodies.values())
    assert caplog.records == []
