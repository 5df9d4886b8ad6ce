"""Training: a constant learning rate that falls to nought at the end, the mean of late weights, resumable."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audioflamingo.datasets.conversations import DataRow
from audioflamingo.training.batches import Batch

from ..vocabulary import CLOSE, QUOTE, TURN_END
from .batches import Mixture
from .dropout import channel_gains
from .forward import FastModel
from .missteps import Marks, with_own_words
from .openings import opening_weights
from .optimizer import BETAS, EPS, EigenAdam
from .parts import SharedWeights, keep_exact_gradients, keep_sinks_silent, parameter_groups
from .peers import Peers
from .teacher import Lessons


@dataclass(frozen=True)
class Plan:
    """Of one run.

    Attributes:
        minutes: of this run, in all its sessions together.
        learning_rate: of q, k, v, gate and up; others get the shares of `parts`.
        warmup_steps: at the start.
        fall_share: last share of the minutes, in which the rate falls to nought.
        smoothing: of the labels.
        shared_share: of each step, for weights that transcripts use, too (see `SharedWeights`).
        self_share: the same for self-attention; as `shared_share` if it is None.
        mean_decay: of the running mean of the weights, which is what is saved.
        channel_dropout: share of the audio's channels, in rows that quote no words (see `dropout`).
        missteps: share of the steps whose transcripts go on behind the model's own words (see `missteps`).
        clip_norm: of the gradient.
        save_minutes: between checkpoints.
    """

    minutes: float
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    fall_share: float = 0.3
    smoothing: float = 0.01
    shared_share: float = 1.0
    self_share: float | None = None
    mean_decay: float = 0.995
    channel_dropout: float = 0.0
    missteps: float = 0.0
    clip_norm: float = 1.0
    save_minutes: float = 5.0


def rate_at(plan: Plan, step: int, share_done: float) -> float:
    """The learning rate at a step, after a share of the minutes."""
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    left = max(0.0, 1 - share_done)
    return plan.learning_rate * warm * min(1.0, left / plan.fall_share if plan.fall_share else 1.0)


class Run:
    """A training run in a folder: `state.pt` to go on from, `log.jsonl`, and the mean of the weights as a model.

    Args:
        fast: the model.
        processor: saved beside the model.
        folder: of the run.
        plan: how.
    """

    def __init__(self, fast: FastModel, processor: Any, folder: Path, plan: Plan) -> None:
        self.fast, self.processor, self.folder, self.plan = fast, processor, folder, plan
        self.speaker = FastModel(fast.model)  # not rounded anew at every token
        self.marks = Marks(*processor.tokenizer.convert_tokens_to_ids([QUOTE, CLOSE, TURN_END]))
        folder.mkdir(parents=True, exist_ok=True)
        groups = parameter_groups(fast.model)
        self.trained = [p for group in groups for p in group["params"]]
        self.optimizers = (
            torch.optim.AdamW(
                [group for group in groups if not group["turned"]],
                lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True,
            ),
            EigenAdam([group for group in groups if group["turned"]]),
        )  # fmt: skip
        self.shared = SharedWeights(fast.model, plan.shared_share, plan.self_share)
        self.mean = [p.detach().clone() for p in self.trained]
        self.step, self.pool, self.seconds = 0, 0, 0.0
        if (folder / "state.pt").exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt")
        with torch.no_grad():
            for parameter, value in zip(self.trained, state["trained"], strict=True):
                parameter.copy_(value)
        self.mean = state["mean"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.pool, self.seconds = state["step"], state["pool"], state["seconds"]

    def save(self) -> None:
        """Writes the state, and the mean of the weights in float16 as `model/`."""
        temporary = self.folder / f".state.{os.getpid()}.pt"
        state = {"trained": self.trained, "mean": self.mean}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state | {"step": self.step, "pool": self.pool, "seconds": self.seconds}, temporary)
        os.replace(temporary, self.folder / "state.pt")
        kept = [p.detach().clone() for p in self.trained]
        self._put(self.mean)
        self.fast.model.save_pretrained(self.folder / "model")
        self.processor.save_pretrained(self.folder / "model")
        self._put(kept)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.copy_(value)
        keep_sinks_silent(self.fast.model)

    def train(self, mixture: Mixture, peers: Peers | None = None, lessons: Lessons | None = None) -> None:
        """Trains until the minutes are over, meets its peers meanwhile, and heeds a teacher."""
        start, saved = time.time(), time.time()
        before = self.seconds
        sums: dict[str, float] = {}
        log = (self.folder / "log.jsonl").open("a")
        for pool, rows in mixture.batches(self.pool):
            self.pool = pool
            self.seconds = before + time.time() - start
            if self.seconds >= self.plan.minutes * 60:
                break
            batch = mixture.encode(rows, [mixture.seed, self.step])
            rng = np.random.default_rng([mixture.seed, self.step])
            figures = self._step(batch, rows, lessons, rng)
            figures["rows"], figures["audio_s"] = len(rows), batch.audio_s
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.step % 20 == 0:
                entry: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds), "pool": pool}
                entry |= {name: round(value / 20, 4) for name, value in sums.items()}
                print(json.dumps(entry), file=log, flush=True)
                sums = {}
            if peers is not None and peers.is_due():
                print(json.dumps({"step": self.step, "met": peers.meet(self.trained)}), file=log, flush=True)
                keep_sinks_silent(self.fast.model)
            if time.time() - saved > 60 * self.plan.save_minutes:
                self.save()
                saved = time.time()
        self.save()

    def _step(
        self, batch: Batch, rows: list[DataRow], lessons: Lessons | None, rng: np.random.Generator
    ) -> dict[str, float]:
        rate = rate_at(self.plan, self.step, self.seconds / (self.plan.minutes * 60))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.zero_grad(set_to_none=True)
        changed: set[int] = set()
        if rng.random() < self.plan.missteps:
            batch, changed = with_own_words(self.speaker, batch, rows, self.marks, rng)
        teachable = [None if number in changed else row for number, row in enumerate(rows)]
        teach = None if lessons is None else partial(lessons.soft, teachable, self.marks.quote)
        weigh = partial(opening_weights, quote=self.marks.quote, end=self.marks.end)
        gains = None
        if self.plan.channel_dropout and batch.input_ids is not None:
            gains = channel_gains(batch.input_ids, self.marks.quote, self.plan.channel_dropout)
        loss, figures = self.fast.loss(batch, self.plan.smoothing, teach, weigh, gains)
        loss.backward()
        keep_exact_gradients(self.fast.model)
        figures["norm"] = float(torch.nn.utils.clip_grad_norm_(self.trained, self.plan.clip_norm))
        with self.shared.held_back():
            for optimizer in self.optimizers:
                optimizer.step()
        keep_sinks_silent(self.fast.model)
        self.step += 1
        if self.step % 4 == 0:
            decay = min(self.plan.mean_decay, self.step / (self.step + 40))
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, [p.detach() for p in self.trained], 1 - decay)
        figures |= {"rate": rate, "missteps": float(len(changed))}
        return figures
