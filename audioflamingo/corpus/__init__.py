"""Transcription of a corpus on a Ray cluster: shards of files to workers, exactly one record a file.

`transcribe_corpus` is the way in. Ray (`pip install 'audioflamingo[ray]'`) is imported when it is called.
"""

from __future__ import annotations

from audioflamingo.corpus.job import CorpusSummary, transcribe_corpus
from audioflamingo.corpus.shards import CorpusFile

__all__ = ["CorpusFile", "CorpusSummary", "transcribe_corpus"]
