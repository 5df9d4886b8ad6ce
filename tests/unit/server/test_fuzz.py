"""A little of `python -m tests.support.fuzz`: mutated files and bodies never end in a 500, a hang or a crash."""

from __future__ import annotations

import logging

import pytest

from tests.support.fuzz import fuzz
from tests.support.server_runs import RunningServer


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_requests(server: RunningServer, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    with server.client() as client, caplog.at_level(logging.ERROR, logger="audioflamingo.server"):
        counts = fuzz(client, "tiny", count=45, seed=seed)
    assert sum(counts["audio"].values()) == sum(counts["bodies"].values()) == 45
    assert counts["bodies"].get(400, 0) > 5
    assert caplog.records == []
