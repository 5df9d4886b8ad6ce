"""Which split a sentence, a recording or a synthesis seed belongs to: decided by a hash, never by order."""

from __future__ import annotations

import hashlib

VALID_PERCENT = 1.0
TEST_PERCENT = 2.0
SPLITS = ("train", "valid", "test")


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


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
