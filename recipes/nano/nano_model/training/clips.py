"""The encoder's rows of all clips, changed (training) or as they are, in the package's cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from audioflamingo.audio.stored import path_of
from audioflamingo.training.feature_cache import CLEAN, AudioFile, FeatureCache, encoder_hash
from audioflamingo.training.training_config import AugmentationConfig, FeatureCacheConfig

SETS = (
    "speech/train_words",
    "speech/train",
    "sound/train",
    "sound_more/train",
    "sound_further/train",
    "sound_zipped/train",
    "sound_made/train",
    "instrument/train",
    "silence/train",
)  # below audio/
CHANGED = 1  # the variant that training takes
CLIPS_AT_ONCE = 1000
SIZE_STEP = 14  # bits of a file's size that do not matter: clips of one length are encoded together


def open_cache(data_dir: Path, model: Any, processor: Any) -> FeatureCache:
    """The cache in DATA/features, with the changes of the recipe: speed, room, noise, band, level."""
    changes = AugmentationConfig(
        speed_probability=0.3, speed=(0.92, 1.08),
        reverb_probability=0.2, reverb_s=(0.1, 0.5),
        noise_probability=0.3, noise_folder=str(data_dir / "audio" / "bed"), noise_snr_db=(8, 25),
        band_probability=0.15,
        gain_probability=0.5,
    )  # fmt: skip
    config = FeatureCacheConfig(str(data_dir / "features"), augmented_copies=1, keep_clean=False)
    width = model.config.audio_config.hidden_size
    return FeatureCache(config, changes, encoder_hash(model, processor), width)


def encode_clips(cache: FeatureCache, data_dir: Path, model: Any, processor: Any) -> None:
    """Encodes the training clips that the cache lacks; stopping it loses little."""
    for name in SETS:
        files = sorted(
            (data_dir / "audio" / name).rglob("[!.]*.flac"),
            key=lambda file: (file.stat().st_size >> SIZE_STEP, file),
        )
        jobs = cache.missing([str(file) for file in files if "/." not in str(file)], [CHANGED])
        start = time.perf_counter()
        for first in range(0, len(jobs), CLIPS_AT_ONCE):
            cache.build(jobs[first : first + CLIPS_AT_ONCE], model, processor)
        if jobs:
            print(f"{name}: {len(jobs)} clips encoded in {time.perf_counter() - start:.0f} s", flush=True)


def encode_as_they_are(cache: FeatureCache, paths: set[AudioFile], model: Any, processor: Any) -> None:
    """Encodes clips of tests."""
    cache.build(cache.missing(sorted(paths, key=path_of), [CLEAN]), model, processor)
