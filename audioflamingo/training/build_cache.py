"""Fills the feature cache before a stage: the work is shared among the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from audioflamingo.datasets.conversations import DataRow, Dataset
from audioflamingo.errors import DataError, require
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.config import TrainingConfig
from audioflamingo.training.feature_cache import CLEAN, FeatureCache, encoder_hash


def prepare_cache(
    config: TrainingConfig,
    accelerator: Any,
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    datasets: Sequence[Dataset],
    validation_rows: Sequence[DataRow],
    num_layers: int | None,
    should_stop: Callable[[], bool],
    show_progress: bool = True,
) -> FeatureCache:
    """Opens the cache and encodes what it lacks: all variants of training clips, the clean one of validation clips.

    Raises:
        DataError: a clip cannot be read, and `on_bad_row` is `error`.
        KeyboardInterrupt: `should_stop` said so; what is encoded is kept.
    """
    assert config.feature_cache is not None
    width = model.config.audio_config.hidden_size
    encoder_id = encoder_hash(model, processor, num_layers)
    cache = FeatureCache(config.feature_cache, config.augmentation, encoder_id, width, num_layers)
    training_rows = sorted((r for dataset in datasets for r in dataset.rows), key=lambda row: row.duration_s)
    jobs = cache.missing(list(dict.fromkeys(path for row in training_rows for path in row.audio)))
    known = set(jobs)
    validation_paths = list(dict.fromkeys(path for row in validation_rows for path in row.audio))
    jobs += [job for job in cache.missing(validation_paths, [CLEAN]) if job not in known]
    accelerator.wait_for_everyone()
    own = jobs[accelerator.process_index :: accelerator.num_processes]
    if jobs:
        tqdm = require("tqdm", "train").tqdm
        is_shown = show_progress and accelerator.is_main_process

        def count(num_clips: int) -> None:
            bar.update(num_clips)
            if should_stop():
                raise KeyboardInterrupt

        with tqdm(
            total=len(own), desc="encoding clips", unit="clip", disable=not is_shown, mininterval=1
        ) as bar:
            cache.build(own, model, processor, config.data.num_workers, count)
        accelerator.wait_for_everyone()
        cache.reload()
        _share_failures(cache, accelerator)
    if cache.failed and config.data.on_bad_row == "error":
        path, message = next(iter(cache.failed.items()))
        place = next(row.place for row in [*training_rows, *validation_rows] if path in row.audio)
        raise DataError(
            f"{place}: {message} {len(cache.failed)} clip(s) in all. Repair them, or set on_bad_row: skip."
        )
    return cache


def _share_failures(cache: FeatureCache, accelerator: Any) -> None:
    """Tells every process about the clips that any of them could not read."""
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        cache.failed.update(gather_object(list(cache.failed.items())))
