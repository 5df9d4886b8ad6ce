"""Encoder outputs on disk, for training with a frozen encoder, or one whose first layers are frozen.

A clip's rows are stored in float16 in shards that are complete or absent. A clip is known by the SHA-256 of its file,
an encoder by that of its weights and front end, an augmentation by its settings, so runs share what fits and nothing
else. The table of files (path, size, time of change -> SHA-256) only saves hashing them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audioflamingo.audio.loading import load_audio, split_windows
from audioflamingo.audio.stored import StoredAudio, path_of
from audioflamingo.errors import AudioError
from audioflamingo.files import replacing, write_text
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.network.encoder import POOL, AudioFlamingo3Encoder
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.augmentation import augment_waveform
from audioflamingo.training.training_config import AugmentationConfig, FeatureCacheConfig

logger = logging.getLogger(__name__)
CLIPS_AT_ONCE = 16
AudioFile = str | StoredAudio
Job = tuple[AudioFile, int]  # recording, variant
CLEAN = 0


@dataclasses.dataclass(frozen=True)
class _Entry:
    shard: str
    start: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class _Group:
    """Clips whose windows are encoded together.

    Attributes:
        jobs: clips that could be read.
        features: log-mel of all their windows, `(W, M, T)`, T the frames of the longest.
        num_frames: valid ones of each window, `(W,)`.
        num_windows: of each clip.
        errors: message of each recording that could not be read.
    """

    jobs: list[Job]
    features: torch.Tensor
    num_frames: torch.Tensor
    num_windows: list[int]
    errors: dict[AudioFile, str]


class FeatureCache:
    """Encoder outputs of clips, in variants: 0 is the clip as it is, 1 to n are augmented.

    Args:
        config: where, and how many variants.
        augmentation: of the variants from 1 on.
        encoder_id: `encoder_hash` of the model.
        width: D_audio.
        num_layers: cache what leaves so many layers of the encoder, a row every 20 ms; None: its audio tokens.

    Attributes:
        failed: message of each recording that could not be read.
    """

    def __init__(
        self,
        config: FeatureCacheConfig,
        augmentation: AugmentationConfig,
        encoder_id: str,
        width: int,
        num_layers: int | None = None,
    ) -> None:
        self.config = config
        self.augmentation = augmentation
        self.folder = Path(config.folder).expanduser() / f"{encoder_id[:16]}-{config.precision}"
        self.width = width
        self.num_layers = num_layers
        self.failed: dict[AudioFile, str] = {}
        settings = dataclasses.asdict(dataclasses.replace(augmentation, spec=type(augmentation.spec)()))
        self._augmentation_id = _sha256(json.dumps(settings, sort_keys=True).encode())[:12]
        self._files = _FileTable(self.folder)
        self._entries: dict[str, _Entry] = {}
        self._shards: dict[str, np.ndarray] = {}
        self.reload()

    @property
    def variants(self) -> list[int]:
        """Variants that each clip has."""
        augmented = (
            range(1, self.config.augmented_copies + 1) if self.augmentation.changes_waveform else range(0)
        )
        return [*([CLEAN] if self.config.keep_clean or not augmented else []), *augmented]

    def draw_variant(self, rng: np.random.Generator | None) -> int:
        """A variant by chance; without a generator the clean one (validation)."""
        variants = self.variants
        return CLEAN if rng is None else variants[int(rng.integers(len(variants)))]

    def get(self, path: AudioFile, variant: int = CLEAN) -> np.ndarray:
        """Rows of a clip, float16 `(A or P, D_audio)`, mapped from disk; do not write to it.

        Raises:
            KeyError: it is not in the cache.
        """
        entry = self._entries[self._key(path, variant)]
        if entry.shard not in self._shards:
            file = self.folder / f"{entry.shard}.bin"
            self._shards[entry.shard] = np.memmap(file, np.float16, "r").reshape(-1, self.width)
        return self._shards[entry.shard][entry.start : entry.start + entry.num_rows]

    def reload(self) -> None:
        """Reads the indices of all complete shards."""
        for file in sorted(self.folder.glob("shard-*.json")):
            if file.stem not in self._shards:
                for key, start, num_rows in json.loads(file.read_text(encoding="utf-8")):
                    self._entries[key] = _Entry(file.stem, start, num_rows)

    def missing(self, paths: Sequence[AudioFile], variants: Sequence[int] | None = None) -> list[Job]:
        """What is not cached yet, in the order of `paths`."""
        self._files.update(paths)
        variants = self.variants if variants is None else variants
        jobs, seen = [], set()
        for path in paths:
            for variant in variants:
                key = self._key(path, variant)
                if key not in self._entries and key not in seen and path not in self.failed:
                    seen.add(key)
                    jobs.append((path, variant))
        return jobs

    def build(
        self,
        jobs: Sequence[Job],
        model: AudioFlamingo3ForConditionalGeneration,
        processor: AudioFlamingo3Processor,
        num_workers: int = 0,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Encodes clips and writes shards; stopping it at any time leaves complete shards only.

        Args:
            jobs: from `missing`; best sorted by length.
            model: its encoder is used, on its device.
            processor: the front end.
            num_workers: processes that read audio and compute log-mel features.
            progress: told the number of clips done.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shard: list[tuple[str, np.ndarray]] = []
        try:
            for group in self._load_groups(jobs, processor, num_workers):
                self.failed.update(group.errors)
                for path, message in group.errors.items():
                    logger.warning("not cached: %s: %s", path, message)
                if group.jobs:
                    rows = _by_clip(*self._encode(model.model.audio_tower, group), group.num_windows)
                    shard += zip((self._key(*job) for job in group.jobs), rows, strict=True)
                progress(len(group.jobs) + len(group.errors))
                if len(shard) >= self.config.shard_clips:
                    self._write_shard(shard)
                    shard = []
        finally:  # what is encoded is kept, also when the user stops
            if shard:
                self._write_shard(shard)

    def _load_groups(
        self, jobs: Sequence[Job], processor: AudioFlamingo3Processor, num_workers: int
    ) -> Iterator[_Group]:
        groups = [list(jobs[i : i + CLIPS_AT_ONCE]) for i in range(0, len(jobs), CLIPS_AT_ONCE)]
        loader = torch.utils.data.DataLoader(
            _ClipLoader(groups, processor, self),
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator(),  # the global one belongs to the training
        )
        return iter(loader)

    @torch.no_grad()
    def _encode(self, tower: AudioFlamingo3Encoder, group: _Group) -> tuple[np.ndarray, list[int]]:
        """Rows of all windows in order, (A or P, D_audio) in float16, and how many each window has."""
        features, device = group.features, next(tower.parameters()).device
        mask = torch.arange(features.shape[-1]) < group.num_frames[:, None]
        was_training = tower.training
        tower.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            rows, lengths = tower.first_layers(features.to(device), mask.to(device), self.num_layers or 0)
            if self.num_layers is None:
                rows, lengths = tower.last_layers(rows, lengths), [length // POOL for length in lengths]
        tower.train(was_training)
        limit = torch.finfo(torch.float16).max
        return rows.float().clamp(-limit, limit).half().cpu().numpy(), lengths

    def load_clip(self, path: AudioFile, variant: int) -> np.ndarray:
        """The waveform of a variant: its chance comes from the clip's content and the variant's number alone."""
        waveform = load_audio(path)
        if variant == CLEAN:
            return waveform
        digest = int(self._files.digest(path)[:15], 16)
        return augment_waveform(waveform, self.augmentation, np.random.default_rng([digest, variant]))

    def _key(self, path: AudioFile, variant: int) -> str:
        kind = "clean" if variant == CLEAN else f"{self._augmentation_id}-{variant}"
        return f"{self._files.digest(path)[:32]}-{kind}"

    def _write_shard(self, items: list[tuple[str, np.ndarray]]) -> None:
        name = f"shard-{uuid.uuid4().hex[:16]}"
        index, start = [], 0
        for key, rows in items:
            index.append((key, start, len(rows)))
            start += len(rows)
        with replacing(self.folder / f"{name}.bin") as temporary, temporary.open("xb") as file:
            for _, rows in items:
                file.write(np.ascontiguousarray(rows).tobytes())
        write_text(self.folder / f"{name}.json", json.dumps(index))  # last: it makes the shard count
        self._entries.update({key: _Entry(name, start, num_rows) for key, start, num_rows in index})
        self._files.save()


class _ClipLoader(torch.utils.data.Dataset[Any]):
    """Groups of clips -> log-mel windows; runs in worker processes."""

    def __init__(
        self, groups: list[list[Job]], processor: AudioFlamingo3Processor, cache: FeatureCache
    ) -> None:
        self.groups, self.processor, self.cache = groups, processor, cache

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> _Group:
        windows: list[np.ndarray] = []
        done: list[Job] = []
        num_windows: list[int] = []
        errors: dict[AudioFile, str] = {}
        for path, variant in self.groups[index]:
            try:
                cut = split_windows(
                    self.cache.load_clip(path, variant), on_long="error", name=repr(str(path))
                )
            except AudioError as error:
                errors[path] = str(error)
                continue
            windows += cut
            num_windows.append(len(cut))
            done.append((path, variant))
        if not windows:
            return _Group([], torch.empty(0, 0, 0), torch.empty(0), [], errors)
        features, mask = self.processor.feature_extractor(windows)
        frames = mask.sum(-1)
        return _Group(done, features[:, :, : int(frames.max())].clone(), frames, num_windows, errors)


def _by_clip(rows: np.ndarray, lengths: list[int], num_windows: list[int]) -> list[np.ndarray]:
    """Cuts the rows of all windows into those of each clip."""
    ends = np.cumsum([0, *lengths])[np.cumsum(num_windows)]
    return np.split(rows, ends[:-1])


class _FileTable:
    """SHA-256 of files, kept beside the shards."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "files.json"
        self._known: dict[str, list[Any]] = {}
        if self._path.exists():
            self._known = json.loads(self._path.read_text(encoding="utf-8"))
        self._fresh: set[str] = set()

    def update(self, paths: Sequence[AudioFile]) -> None:
        """Hashes the files that are new or have changed."""
        before = len(self._fresh)
        for path in paths:
            self.digest(path)
        if len(self._fresh) > before:
            self.save()

    def digest(self, audio: AudioFile) -> str:
        """Of a recording: of its file, or of the part of the file that it is."""
        path = path_of(audio)
        if isinstance(audio, StoredAudio):
            return audio.digest("" if audio.member or audio.cell else self.digest(path))
        if path not in self._fresh:
            state = os.stat(path)
            known = self._known.get(path)
            if known is None or known[:2] != [state.st_size, state.st_mtime_ns]:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._known[path] = [state.st_size, state.st_mtime_ns, digest]
            self._fresh.add(path)
        return str(self._known[path][2])

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self._known))


def encoder_hash(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    num_layers: int | None = None,
) -> str:
    """SHA-256 of the front end's settings and of the encoder's weights, or of those up to so many layers."""
    digest = hashlib.sha256(json.dumps(processor.feature_extractor.to_dict(), sort_keys=True).encode())
    tower = model.model.audio_tower
    digest.update(f"{num_layers}".encode() if num_layers is not None else b"")
    for name, tensor in sorted(tower.state_dict().items()):
        if num_layers is not None and not _is_below(name, num_layers):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_below(name: str, num_layers: int) -> bool:
    """Whether a parameter of the encoder is used before layer `num_layers`."""
    first, _, rest = name.partition(".")
    return first != "layer_norm" and (first != "layers" or int(rest.partition(".")[0]) < num_layers)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
