"""Human speech for evaluation only: telephone prompts (Debian's asterisk-core-sounds-en-g722) and a few sentences of a
novel, read by a volunteer of LibriVox (Debian's pocketsphinx-testdata).

The prompts' package holds no transcripts. `tables/human_transcripts.tsv` was written by a judge (Whisper base, see the
README) and read over; prompts whose words were in doubt are not in it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from .messages import TABLES, read_table
from .normalise import normalise
from .store import SAMPLING_RATE, make_shard, write_clip
from .voices import read_resampled

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "human_transcripts.tsv"
READ_SOUNDS = "usr/share/pocketsphinx/test/data/librivox"
READ_TRANSCRIPTS = "read_transcripts.tsv"


def transcripts(table: str = TRANSCRIPTS) -> dict[str, str]:
    """file (relative to the package's folder) -> normalised transcript."""
    if not (TABLES / table).exists():
        return {}
    return {row["file"]: normalise(row["text"]) for row in read_table(table)}


def all_transcripts() -> list[str]:
    """What people say in the evaluation: not to be trained on."""
    return [*transcripts().values(), *transcripts(READ_TRANSCRIPTS).values()]


def decode_g722(path: Path) -> Any:
    """Decodes a headerless G.722 file to float32 (N,) at 16 kHz."""
    import numpy as np

    command = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "g722",
        "-i",
        str(path),
        "-ar",
        str(SAMPLING_RATE),
        "-f",
        "f32le",
        "-",
    ]
    return np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.float32)


def make_human(data_dir: Path, unpacked: Path) -> bool:
    """audio/human: every prompt as FLAC, with its transcript where there is one."""
    known = transcripts()

    def fill(working: Path) -> list[dict[str, Any]]:
        rows = []
        for path in sorted((unpacked / SOUNDS).rglob("*.g722")):
            source = path.relative_to(unpacked / SOUNDS).as_posix()
            if source not in known:
                continue
            file = source.replace("/", "_").replace(".g722", ".flac")
            duration_s = round(write_clip(working / file, decode_g722(path)), 3)
            rows.append(
                {
                    "id": Path(file).stem,
                    "file": file,
                    "duration_s": duration_s,
                    "text": known[source],
                    "source": source,
                }
            )
        return rows

    return make_shard(data_dir / "audio" / "human", fill)


def make_read(data_dir: Path, unpacked: Path) -> bool:
    """audio/read: the sentences read aloud."""

    def fill(working: Path) -> list[dict[str, Any]]:
        rows = []
        for source, text in transcripts(READ_TRANSCRIPTS).items():
            file = source.replace(".wav", ".flac")
            duration_s = round(write_clip(working / file, read_resampled(unpacked / READ_SOUNDS / source)), 3)
            rows.append({"id": Path(file).stem, "file": file, "duration_s": duration_s, "text": text})
        return rows

    return make_shard(data_dir / "audio" / "read", fill)
