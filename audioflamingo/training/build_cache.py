"""Fills the feature cache before a stage: the work is shared among the processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from audioflamingo.errors import DataError
from audioflamingo.training.display import Bar
from audioflamingo.training.feature_cache import CLEAN, FeatureCache, encoder_hash
from audioflamingo.training.training_run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare_cache(run: Run) -> FeatureCache:
    """Opens the cache and encodes what it lacks: all variants of training clips, the clean one of validation clips.

    Raises:
        DataError: a clip cannot be read, and `on_bad_row` is `error`.
        KeyboardInterrupt: the run is to stop; what is encoded is kept.
    """
    config, accelerator, model = run.config, run.accelerator, run.model
    assert config.feature_cache is not None
    width = model.config.audio_config.hidden_size
    encoder_id = encoder_hash(model, run.processor, run.cached_layers)
    cache = FeatureCache(config.feature_cache, config.augmentation, encoder_id, width, run.cached_layers)
    training_rows = sorted((r for d in run.datasets for r in d.rows), key=lambda row: row.duration_s)
    jobs = cache.missing(list(dict.fromkeys(path for row in training_rows for path in row.audio)))
    known = set(jobs)
    validation_paths = list(dict.fromkeys(path for row in run.validation_rows for path in row.audio))
    jobs += [job for job in cache.missing(validation_paths, [CLEAN]) if job not in known]
    accelerator.wait_for_everyone()
    own = jobs[accelerator.process_index :: accelerator.num_processes]
    if jobs:
        with Bar("encoding clips", len(own), run.show_progress) as bar:

            def count(num_clips: int) -> None:
                bar.move(bar.done + num_clips, f"{int(bar.done) + num_clips} of {len(own)} clips")
                if run.stop_signal.is_set:
                    raise KeyboardInterrupt

            cache.build(own, model, run.processor, config.data.num_workers, count)
        accelerator.wait_for_everyone()
        cache.reload()
        _share_failures(cache, accelerator)
    if cache.failed and config.data.on_bad_row == "error":
        path, message = next(iter(cache.failed.items()))
        place = next(row.place for row in [*training_rows, *run.validation_rows] if path in row.audio)
        raise DataError(
            f"{place}: {message} {len(cache.failed)} clip(s) in all. Repair them, or set on_bad_row: skip."
        )
    return cache


def _share_failures(cache: FeatureCache, accelerator: Accelerator) -> None:
    """Tells every process about the clips that any of them could not read."""
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        cache.failed.update(gather_object(list(cache.failed.items())))
