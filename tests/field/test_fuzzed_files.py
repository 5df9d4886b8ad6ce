"""A little of `python -m tests.support.fuzz`: no crash, no endless silence, no other exception."""

from __future__ import annotations

from tests.support.fuzz import decode, transcripts


def test_mutated_files() -> None:
    """The seed is fixed, so there are no false alarms."""
    counts = decode(500, seed=3)
    assert counts["refused"] > 150
    assert counts["heard"] > 50


def test_transcripts_of_mutated_files() -> None:
    counts = transcripts(60, seed=4)
    assert counts["refused"] > 10
    assert counts["heard"] + counts["warned"] + counts["no speech"] > 10
    assert counts["heard"] > 2
    assert counts["warned"] > 2
