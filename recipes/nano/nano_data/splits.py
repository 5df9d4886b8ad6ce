"""Which split a sentence, a recording or a synthesis seed belongs to: decided by a hash, never by order.

A draw is a second set of tests out of what is held out: its name goes into all seeds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

VALID_PERCENT = 1.0
TEST_PERCENT = 2.0
SPLITS = ("train", "valid", "test")
DRAW_VARIABLE = "NANO_DRAW"  # of the environment, so that the workers know it


def bucket(key: str) -> float:
    """A number in [0, 100) that depends on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 * 100


def text_split(normalised: str) -> str:
    """Split of a sentence, by its transcript: whoever says it, however spelled, it stays in one split."""
    place = bucket("text:" + normalised)
    if place < TEST_PERCENT:
        return "test"
    return "valid" if place < TEST_PERCENT + VALID_PERCENT else "train"


def draw() -> str:
    """Name of the draw that is being made, "" for the usual data."""
    return os.environ.get(DRAW_VARIABLE, "")


def made_now(names: Iterable[str]) -> list[str]:
    """Of sets or splits those to make: a draw has tests only."""
    return [name for name in names if not draw() or name.startswith("test")]


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on the parts and the draw alone, the same in every process."""
    named = [*parts, draw()] if draw() else parts
    digest = hashlib.sha256("/".join(map(str, named)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
