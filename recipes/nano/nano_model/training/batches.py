"""Which rows form which batch: draws without end from weighted sets of conversations, by a seed and a number alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audioflamingo.audio.stored import path_of
from audioflamingo.datasets.conversations import DataRow, read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.training.batches import Batch, BatchEncoder

POOL = 640  # rows that are sorted by length and cut into batches
AUDIO_COST = 0.06  # of an audio token, against a text token
AUDIO_TOKENS_PER_S = 25


@dataclass(frozen=True)
class Source:
    """A file of conversations.

    Attributes:
        path: JSON lines.
        share: of the rows that are drawn.
        answer_weight: of its answers' tokens in the loss.
    """

    path: Path
    share: float
    answer_weight: float = 1.0


class Mixture:
    """Rows of several files, of which the files' clips are in the cache.

    Args:
        sources: the files; a file without usable rows is left out.
        encoder: makes batches; its cache says which clips there are.
        max_cost: text tokens of a batch, and `AUDIO_COST` for each of audio.
        seed: of all draws.
    """

    def __init__(
        self, sources: Sequence[Source], encoder: BatchEncoder, max_cost: float, seed: int = 0
    ) -> None:
        self.encoder, self.max_cost, self.seed = encoder, max_cost, seed
        cache = encoder.cache
        assert cache is not None
        variant = cache.variants[-1]
        self.sets: list[list[DataRow]] = []
        shares = []
        for source in sources:
            dataset = read_dataset(
                DatasetConfig(str(source.path), answer_weight=source.answer_weight), on_bad_row="skip"
            )
            known = {path for row in dataset.rows for path in row.audio}
            missing = {path for path, _ in cache.missing(sorted(known, key=path_of), [variant])}
            rows = [row for row in dataset.rows if not missing.intersection(row.audio)]
            if rows:
                self.sets.append(rows)
                shares.append(source.share)
        self.shares = np.array(shares) / sum(shares)

    def pool(self, number: int) -> list[list[DataRow]]:
        """The batches of the pool of a number, mixed."""
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.choice(len(self.sets), POOL, p=self.shares)
        rows = [self.sets[i][int(rng.integers(len(self.sets[i])))] for i in chosen]
        costs = np.array([self.cost(row) for row in rows])
        order = np.argsort(costs * rng.uniform(0.9, 1.1, len(costs)))
        batches: list[list[DataRow]] = [[]]
        total = 0.0
        for place in order:
            if batches[-1] and total + costs[place] > self.max_cost:
                batches.append([])
                total = 0.0
            batches[-1].append(rows[place])
            total += costs[place]
        return [batches[i] for i in rng.permutation(len(batches))]

    def cost(self, row: DataRow) -> float:
        """Of training on a row, in text tokens."""
        return len(self.encoder._text(row).token_ids) + AUDIO_COST * AUDIO_TOKENS_PER_S * row.duration_s

    def batches(self, start: int = 0) -> Iterator[tuple[int, list[DataRow]]]:
        """(pool, rows) without end, from a pool on."""
        number = start
        while True:
            for rows in self.pool(number):
                yield number, rows
            number += 1

    def encode(self, rows: list[DataRow], seed: Sequence[int] | None) -> Batch:
        """Tensors of a batch."""
        return self.encoder(rows, seed)


def read_sources(file: Path, data_dir: Path) -> list[Source]:
    """The files of a mixture: a JSON list of [name, share, answer weight]; files that are not there are left out."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    sources = [Source(data_dir / f"train_{name}.jsonl", share, weight) for name, share, weight in entries]
    return [source for source in sources if source.path.exists() and source.path.stat().st_size]
