"""The folder of a run: one run at a time, the same config and the same data from its first step to its last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audioflamingo.audio.stored import path_of
from audioflamingo.datasets.conversations import Dataset, count_reasons
from audioflamingo.errors import ConfigError, OutputError, reason_of
from audioflamingo.files import fingerprint_file, to_json, write_text
from audioflamingo.training.resume import list_checkpoints, read_state
from audioflamingo.training.training_config import TrainingConfig
from audioflamingo.training.training_run import CHECKPOINTS_FOLDER

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
SKIPPED_FILE = "skipped.jsonl"
LOCK_FILE = ".lock"
# Keys that may differ between a run and its continuation: they do not change what is learned.
_FREE_KEYS = (
    "output_dir",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "tensorboard",
    "device",
)


class RunFolder:
    """The output folder of a run.

    Args:
        config: of the run.
        accelerator: of accelerate; only its main process writes.

    Attributes:
        path: the folder.
        fingerprint: of the config.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = Path(config.output_dir).expanduser()
        self.fingerprint = _fingerprint(config)
        self._lock: int | None = None

    def open(self, fresh: bool) -> Path | None:
        """Makes the folder and locks it; returns the checkpoint to go on from.

        Raises:
            ConfigError: another run works there, or one of another config did.
            OutputError: it cannot be written to.
        """
        folder = self.path / CHECKPOINTS_FOLDER
        if self.accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._take_lock()
            except OSError as error:
                raise OutputError(f"cannot use the folder {str(self.path)!r}: {reason_of(error)}.") from error
            if fresh:
                _remove_run(self.path)
        self.accelerator.wait_for_everyone()
        checkpoints = list_checkpoints(folder)
        if checkpoints and read_state(checkpoints[-1])[1] != self.fingerprint:
            difference = _difference(self.path, self.config)
            self.close()
            raise ConfigError(
                f"{str(self.path)!r} holds a run of another config ({difference}); choose another output_dir, "
                "or start again with --fresh."
            )
        if self.accelerator.is_main_process:
            write_text(self.path / CONFIG_FILE, to_json(self.config.to_dict()))
        return checkpoints[-1] if checkpoints else None

    def _take_lock(self) -> None:
        """Locks the folder until this process ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise ConfigError(
                f"another run is at work in {str(self.path)!r}; choose another output_dir, or wait for it."
            ) from None

    def close(self) -> None:
        """Lets other runs in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_data(
        self, train: Sequence[Dataset], validation: Sequence[Dataset], is_begun: bool
    ) -> dict[str, str]:
        """Checks that a run that has begun goes on with the rows and the audio that it began with.

        Returns:
            The fingerprints of the audio files, by path; of the main process only.

        Raises:
            ConfigError: they have changed.
        """
        if not self.accelerator.is_main_process:
            return {}
        configs = [*self.config.data.train, *self.config.data.validation]
        datasets = [*train, *validation]
        files = [{path_of(clip) for row in dataset.rows for clip in row.audio} for dataset in datasets]
        digests = {path: fingerprint_file(path) for path in sorted(set().union(*files))}
        now: list[dict[str, Any]] = [
            {
                "path": item.path,
                "rows": len(dataset.rows),
                "sha256": _digest(dataset),
                "audio": {path: digests[path] for path in paths},
            }
            for item, dataset, paths in zip(configs, datasets, files, strict=True)
        ]
        file = self.path / DATA_FILE
        if is_begun and file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))["datasets"]
            for old, new in zip(before, now, strict=True):
                if old["sha256"] != new["sha256"]:
                    raise ConfigError(
                        f"{new['path']} has changed since the run in {str(self.path)!r} began ({old['rows']} rows "
                        f"then, {new['rows']} now). Put it back, or start again with --fresh."
                    )
                if changed := _changed(old.get("audio", {}), new["audio"]):
                    raise ConfigError(
                        f"{changed} has changed since the run in {str(self.path)!r} began. Put it back, or start again "
                        "with --fresh."
                    )
        else:
            write_text(file, to_json({"datasets": now}))
        return digests

    def report_skipped(self, datasets: Sequence[Dataset], is_shown: bool) -> None:
        """Writes what was left out, a line each with its reason, and says how many for which kind of reason."""
        skipped = [item for dataset in datasets for item in dataset.skipped]
        if not self.accelerator.is_main_process:
            return
        lines = (json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in skipped)
        write_text(self.path / SKIPPED_FILE, "".join(lines))
        if skipped and is_shown:
            kinds = "; ".join(f"{number} {reason}" for reason, number in count_reasons(skipped)[:5])
            logger.warning("%d rows left out (%s): see %s", len(skipped), kinds, self.path / SKIPPED_FILE)


def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for row in dataset.rows:
        digest.update(json.dumps([row.place, row.id, row.messages, row.duration_s], default=str).encode())
    return digest.hexdigest()


def _changed(before: dict[str, str], now: dict[str, str]) -> str | None:
    return next((path for path, digest in before.items() if now.get(path, digest) != digest), None)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _FREE_KEYS}
    return {**kept, "data": {key: value for key, value in config["data"].items() if key != "num_workers"}}


def _fingerprint(config: TrainingConfig) -> str:
    return hashlib.sha256(json.dumps(_comparable(config.to_dict()), sort_keys=True).encode()).hexdigest()


def _difference(output_dir: Path, config: TrainingConfig) -> str:
    """Keys in which the stored config differs."""
    try:
        stored = _comparable(json.loads((output_dir / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return "its config is gone"
    ours = json.loads(json.dumps(_comparable(config.to_dict())))
    differing = [key for key in ours if stored.get(key) != ours[key]]
    return f"different: {', '.join(differing)}" if differing else "of another version"


def _remove_run(output_dir: Path) -> None:
    for name in (CHECKPOINTS_FOLDER, "tensorboard"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "log.jsonl").unlink(missing_ok=True)
    (output_dir / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
