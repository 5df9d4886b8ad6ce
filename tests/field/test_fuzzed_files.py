"""A little of `python -m tests.support.fuzz --decode-only`: no crash, no endless silence, no other exception."""

from __future__ import annotations

from tests.support.fuzz import decode


def test_mutated_files() -> None:
    """The seed is fixed, so there are no false alarms."""
    counts = decode(500, seed=3)
    assert counts["refused"] > 150
    assert counts["heard"] > 50
