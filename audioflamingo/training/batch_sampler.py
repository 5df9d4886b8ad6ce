"""Which rows form which batch: a pure function of the seed and the epoch, so that a run resumes by number alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from audioflamingo.config import AUDIO_TOKENS_PER_S
from audioflamingo.errors import ConfigError
from audioflamingo.training.training_config import BatchConfig

POOL_BATCHES = 50  # rows are sorted by length within pools of about so many batches
JITTER = 0.1  # relative; without it, few data would form the same batches in every epoch
CHARACTERS_PER_TOKEN = 3.0
FIXED_TOKENS = 20  # system prompt, roles


def estimate_tokens(duration_s: float, num_characters: int) -> int:
    """Tokens of a row, roughly: exact enough to fill batches."""
    return math.ceil(duration_s * AUDIO_TOKENS_PER_S + num_characters / CHARACTERS_PER_TOKEN) + FIXED_TOKENS


def plan_epoch(
    tokens: Sequence[int],
    audio_s: Sequence[float],
    sets: Sequence[tuple[int, float]],
    config: BatchConfig,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Batches of one epoch, in the order in which they are trained on.

    Args:
        tokens: estimated tokens of each row.
        audio_s: seconds of audio of each row.
        sets: for each data set, in the order of the rows, its number of rows and its weight.
        config: limits of a batch.
        seed: all chance comes from it and the epoch.
        epoch: counted from 0.

    Returns:
        Row numbers of each batch; a multiple of `batches_per_step` batches. What is over at the end is left out, other
        rows each epoch.

    Raises:
        ConfigError: the data do not fill one step.
    """
    rng = np.random.default_rng([seed, epoch, 0])
    rows = rng.permutation(np.concatenate(list(_weighted_rows(sets, rng))))
    pool_size = POOL_BATCHES * _typical_rows(tokens, audio_s, config)
    batches: list[list[int]] = []
    for start in range(0, len(rows), pool_size):
        pool = rows[start : start + pool_size]
        lengths = np.array([tokens[row] for row in pool]) * rng.uniform(1 - JITTER, 1 + JITTER, len(pool))
        pool = pool[np.argsort(lengths, kind="stable")].tolist()
        batches += cut_batches(pool, tokens, audio_s, config)
    num_kept = len(batches) // config.batches_per_step * config.batches_per_step
    if num_kept == 0:
        raise ConfigError(
            f"the data give {len(batches)} batches an epoch, fewer than batches_per_step {config.batches_per_step}."
        )
    return [batches[i] for i in rng.permutation(len(batches))[:num_kept]]


def cut_batches(
    rows: Sequence[int], tokens: Sequence[int], audio_s: Sequence[float], config: BatchConfig
) -> list[list[int]]:
    """Cuts rows into batches in order; a row that passes the limits alone has a batch of its own."""
    batches: list[list[int]] = []
    num_tokens, seconds = 0, 0.0
    for row in rows:
        num_tokens += tokens[row]
        seconds += audio_s[row]
        is_full = (
            not batches
            or len(batches[-1]) >= config.max_rows
            or num_tokens > config.max_tokens
            or (config.max_audio_s is not None and seconds > config.max_audio_s)
        )
        if is_full:
            batches.append([])
            num_tokens, seconds = tokens[row], audio_s[row]
        batches[-1].append(row)
    return batches


def _weighted_rows(sets: Sequence[tuple[int, float]], rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of an epoch: each set as often as its weight says, the fraction drawn anew."""
    chosen, start = [], 0
    for num_rows, weight in sets:
        whole = int(weight)
        chosen += [np.arange(start, start + num_rows)] * whole
        num_more = round((weight - whole) * num_rows)
        chosen.append(start + rng.permutation(num_rows)[:num_more])
        start += num_rows
    return chosen


def _typical_rows(tokens: Sequence[int], audio_s: Sequence[float], config: BatchConfig) -> int:
    per_batch = config.max_tokens / max(1.0, float(np.mean(tokens)))
    if config.max_audio_s is not None:
        per_batch = min(per_batch, config.max_audio_s / max(0.1, float(np.mean(audio_s))))
    return max(1, min(config.max_rows, int(per_batch)))
