"""Tells checkpoints apart without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

PATTERNS = ("*.json", "*.jinja", "*.txt", "*.safetensors")
NUM_SAMPLES = 64  # stretches that are read of a large file: training changes every one of them
SAMPLE_BYTES = 16384


def fingerprint_checkpoint(folder: Path) -> str:
    """A digest of the names, sizes and contents of a checkpoint's files; of large ones, samples of the content."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.rglob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= NUM_SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(NUM_SAMPLES):
                file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
