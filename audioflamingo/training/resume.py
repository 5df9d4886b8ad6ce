"""Checkpoints to resume from: a folder that is complete or absent, holding everything the next steps depend on.

Tensors are gathered under their plain names, so that a checkpoint of one process, many or FSDP looks the same. Weights
that no stage trained are not stored: they are in the model that the run started from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from audioflamingo.errors import OutputError, TrainingError, reason_of
from audioflamingo.files import sync_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAME = re.compile(r"step-(\d{9})")
TENSORS_FILE = "tensors.pt"
STATE_FILE = "state.json"


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps of the whole run that are done.
        stage: number of the current stage.
        stage_step: steps of that stage that are done.
        epoch, epoch_step: position in the data: the epoch of the stage, and its steps that are done.
        stage_s: seconds spent in the stage.
        best: best value of the metric, None before the first validation.
        best_step: its step.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    stage_s: float = 0.0
    best: float | None = None
    best_step: int | None = None

    def begin_stage(self, stage: int) -> None:
        """Resets what counts within a stage."""
        self.stage, self.stage_step, self.epoch, self.epoch_step, self.stage_s = stage, 0, 0, 0, 0.0


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    stored_names: set[str],
    progress: Progress,
    keep: int,
    fingerprint: str,
) -> Path:
    """Writes a checkpoint; all processes call it.

    Args:
        folder: of all checkpoints of the run.
        accelerator: of accelerate.
        module: the trainer's module, wrapped or not.
        optimizer: None between stages.
        stored_names: parameters that may differ from the start.
        progress: where the run is.
        keep: older checkpoints beyond this number are removed.
        fingerprint: of the config.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"step-{progress.step:09d}"
    working = folder / f".{target.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(working, ignore_errors=True)
    accelerator.wait_for_everyone()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = {
        name: t for name, t in get_model_state_dict(module, options=options).items() if name in stored_names
    }
    tensors: dict[str, Any] = {"weights": weights}
    if optimizer is not None:
        tensors["optimizer"] = get_optimizer_state_dict(module, optimizer, options=options)
    if accelerator.scaler is not None:
        tensors["scaler"] = accelerator.scaler.state_dict()
    _write(working / f"random-{accelerator.process_index}.pt", partial(torch.save, random_state()))
    if accelerator.is_main_process:
        _write(working / TENSORS_FILE, partial(torch.save, tensors))
        state = {
            "progress": dataclasses.asdict(progress),
            "fingerprint": fingerprint,
            "num_processes": accelerator.num_processes,
        }
        content = json.dumps(state, indent=2).encode()
        _write(working / STATE_FILE, lambda file: file.write(content))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(working, target)
        sync_folder(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def read_state(checkpoint: Path) -> tuple[Progress, str]:
    """Progress and the config's fingerprint.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return Progress(**state["progress"]), state["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"the checkpoint {checkpoint} is damaged ({error}); remove it.") from error


class LoadedCheckpoint:
    """A checkpoint's tensors, put back in two steps: weights before the optimizer exists, the rest after."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.tensors = torch.load(checkpoint / TENSORS_FILE, map_location="cpu", weights_only=True)

    @property
    def has_optimizer(self) -> bool:
        """False for a checkpoint between two stages."""
        return "optimizer" in self.tensors

    def restore_weights(self, module: nn.Module, stored_names: set[str]) -> None:
        """Puts the weights back.

        Raises:
            TrainingError: the checkpoint holds other tensors than this run trains.
        """
        found = set(self.tensors["weights"])
        if found != stored_names:
            odd = sorted(found ^ stored_names)
            raise TrainingError(
                f"{self.path} does not fit the run: {len(odd)} tensors differ, such as {odd[0]}."
            )
        options = StateDictOptions(full_state_dict=True, strict=False)
        result = set_model_state_dict(module, self.tensors["weights"], options=options)
        if result.unexpected_keys:
            raise TrainingError(f"{self.path} holds unknown tensors: {sorted(result.unexpected_keys)[:3]}.")

    def restore_optimizer(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
    ) -> None:
        """Puts the optimizer, the loss scaler and this process's random state back."""
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(module, optimizer, self.tensors["optimizer"], options=options)
        if accelerator.scaler is not None and "scaler" in self.tensors:
            accelerator.scaler.load_state_dict(self.tensors["scaler"])
        own = self.path / f"random-{accelerator.process_index}.pt"
        if own.exists():  # a run that goes on with more processes has none for the new ones
            set_random_state(torch.load(own, weights_only=False))


def random_state() -> dict[str, Any]:
    """States of all random generators that training can reach."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a file of a checkpoint that nobody counts on yet; `fill` gets it open.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        # torch turns a full disk into a RuntimeError about its own file format.
        reason = reason_of(error) if isinstance(error, OSError) else "the disk took only a part of it"
        raise OutputError(
            f"the checkpoint {path.parent} cannot be written: {reason}; those before it are whole. Make room, and give "
            "the same command again."
        ) from error
