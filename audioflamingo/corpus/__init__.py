"""Transcription of a corpus on a Ray cluster: shards of files to workers, exactly one record a file; and evaluation.

`transcribe_corpus` and `evaluate_on_cluster` are the ways in. Ray (`pip install 'audioflamingo[ray]'`) is imported when
they are called.
"""

from __future__ import annotations

from audioflamingo.corpus.cluster import ClusterOptions
from audioflamingo.corpus.corpus_job import CorpusSummary, CorpusWatcher, transcribe_corpus
from audioflamingo.corpus.evaluation_job import evaluate_on_cluster
from audioflamingo.corpus.records import CorpusFile

__all__ = [
    "ClusterOptions",
    "CorpusFile",
    "CorpusSummary",
    "CorpusWatcher",
    "evaluate_on_cluster",
    "transcribe_corpus",
]
