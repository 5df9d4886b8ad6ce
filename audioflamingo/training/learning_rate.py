"""How long a stage lasts, and its learning rate at each step: pure functions of where the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from audioflamingo.training.training_config import StageConfig


@dataclass(frozen=True)
class Schedule:
    """Length and rates of a stage.

    Attributes:
        stage: its settings.
        num_steps: steps of the stage by `max_steps` and `max_epochs`, the smaller; None if only the clock ends it.
    """

    stage: StageConfig
    num_steps: int | None

    @classmethod
    def of(cls, stage: StageConfig, steps_per_epoch: int) -> Schedule:
        """Builds the schedule of a stage whose epochs have `steps_per_epoch` steps."""
        limits = [stage.max_steps] if stage.max_steps is not None else []
        if stage.max_epochs is not None:
            limits.append(max(1, round(stage.max_epochs * steps_per_epoch)))
        return cls(stage, min(limits, default=None))

    def share_done(self, step: int, elapsed_s: float) -> float:
        """Share of the stage that is behind, in [0, 1]: by steps where they are limited, else by the clock."""
        if self.num_steps is not None:
            return min(1.0, step / self.num_steps)
        assert self.stage.max_minutes is not None
        return min(1.0, elapsed_s / (60 * self.stage.max_minutes))

    def is_over(self, step: int, elapsed_s: float) -> bool:
        """Whether the stage ends after `step` steps and `elapsed_s` seconds."""
        is_late = self.stage.max_minutes is not None and elapsed_s >= 60 * self.stage.max_minutes
        return is_late or (self.num_steps is not None and step >= self.num_steps)

    def rate_factor(self, step: int, elapsed_s: float) -> float:
        """Factor of the learning rates for the step after `step` steps: linear warm-up, then a cosine."""
        warmup = min(1.0, (step + 1) / self.stage.warmup_steps) if self.stage.warmup_steps else 1.0
        if self.stage.schedule == "constant":
            return warmup
        final = self.stage.final_rate
        cosine = 0.5 * (1 + math.cos(math.pi * self.share_done(step, elapsed_s)))
        return warmup * (final + (1 - final) * cosine)

    def seconds_left(self, step: int, elapsed_s: float) -> float | None:
        """Seconds until the end at the speed so far; None before the first step."""
        left = []
        if self.stage.max_minutes is not None:
            left.append(60 * self.stage.max_minutes - elapsed_s)
        if self.num_steps is not None and step > 0:
            left.append(elapsed_s / step * (self.num_steps - step))
        return max(0.0, min(left)) if left else None
