"""Transcription of a corpus on a Ray cluster: shards of files to workers, exactly one record a file.

`transcribe_corpus` is the way in. Ray (`pip install 'audioflamingo[ray]'`) is imported when it is called.
"""

from __future__ import annotations

from audioflamingo.corpus.cluster import ClusterOptions
from audioflamingo.corpus.corpus_job import CorpusSummary, CorpusWatcher, transcribe_corpus
from audioflamingo.corpus.records import CorpusFile

__all__ = ["ClusterOptions", "CorpusFile", "CorpusSummary", "CorpusWatcher", "transcribe_corpus"]
