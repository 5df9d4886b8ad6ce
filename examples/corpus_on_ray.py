"""Transcribes files on a Ray cluster, one record each: `python examples/corpus_on_ray.py out/ *.wav`.

Without `RAY_ADDRESS` a cluster of this machine alone is started for it. The command `af3 transcribe --engine ray` does
the same and shows how it goes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from audioflamingo.corpus import ClusterOptions, CorpusFile, transcribe_corpus

MODEL = os.environ.get("AF3_MODEL", "nano")


def load() -> Any:
    """Called once by each worker."""
    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(MODEL, device_map="auto")
    return model, AutoProcessor.from_pretrained(MODEL)


if __name__ == "__main__":
    output_dir, *paths = sys.argv[1:]
    summary = transcribe_corpus(
        [CorpusFile(path, os.path.abspath(path)) for path in paths],
        output_dir,
        load,
        model={"model": MODEL},
        cluster=ClusterOptions(address=os.environ.get("RAY_ADDRESS", "local"), num_workers=1),
    )
    print(f"{summary.path}: {summary.num_files} records, {summary.num_failed} of errors")
