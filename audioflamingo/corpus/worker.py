"""What an actor of the cluster does: it holds one model and transcribes shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from audioflamingo.corpus.records import transcribe_files
from audioflamingo.corpus.shards import Shard
from audioflamingo.transcription.options import TranscriptionOptions

Load = Callable[[], tuple[Any, Any]]

MAX_ATTEMPTS = 3  # times that a shard may take its worker down with it


class AttemptCounter:
    """Counts how often each shard was begun. The cluster itself tries a shard again forever."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def count(self, index: int) -> int:
        """Counts one more attempt and returns how many there are now."""
        self._counts[index] += 1
        return self._counts[index]


class ShardWorker:
    """Turns the row of a shard into the row of its result.

    What goes wrong is part of the result, because the cluster would only say that a task has failed:
    `load_error` holds why there is no model, `failure` what broke the shard as a whole, each empty if all is
    well. A file that cannot be read breaks nothing: its record has its error.

    Args:
        load: gives a model and its processor.
        options: how files are transcribed.
        count_attempt: `AttemptCounter.count`, of one counter for all workers.
    """

    def __init__(
        self, load: Load, options: TranscriptionOptions, count_attempt: Callable[[int], int]
    ) -> None:
        self._options = options
        self._count_attempt = count_attempt
        self._load_error = ""
        try:
            self._model, self._processor = load()
        except Exception as error:
            self._load_error = _describe(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result = {"index": row["index"], "records": "", "failure": "", "load_error": self._load_error}
        if self._load_error:
            return result
        if self._count_attempt(row["index"]) > MAX_ATTEMPTS:
            return {
                **result,
                "failure": f"its worker died {MAX_ATTEMPTS} times: a crash, or not enough memory",
            }
        try:
            files = Shard.from_row(row).files
            records = transcribe_files(self._model, self._processor, files, self._options)
            return {**result, "records": "".join(records)}
        except Exception as error:
            return {**result, "failure": _describe(error)}


def _describe(error: Exception) -> str:
    from audioflamingo.errors import AudioFlamingoError

    text = " ".join(str(error).split())
    if isinstance(error, AudioFlamingoError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
