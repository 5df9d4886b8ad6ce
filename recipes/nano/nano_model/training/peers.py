"""Several trainers on different rows that take the mean of their weights now and then: without a wait for gradients."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

WAIT_S, PAUSE_S = 120.0, 0.5


class Peers:
    """A place to meet.

    Args:
        folder: where the weights are laid.
        rank, count: this trainer among how many.
        every_s: seconds of the clock between two meetings.
    """

    def __init__(self, folder: Path, rank: int = 0, count: int = 1, every_s: float = 240.0) -> None:
        self.folder, self.rank, self.count, self.every_s = folder, rank, count, every_s
        self.meeting = int(time.time() // every_s)

    def is_due(self) -> bool:
        """Whether the time of the next meeting has come."""
        return self.count > 1 and int(time.time() // self.every_s) > self.meeting

    @torch.no_grad()
    def meet(self, weights: list[Tensor]) -> int:
        """Replaces the weights by the mean over all trainers that come in time; returns how many came."""
        self.meeting = int(time.time() // self.every_s)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{self.rank}.{os.getpid()}"
        torch.save([weight.detach() for weight in weights], temporary)
        os.replace(temporary, self._file(self.rank, self.meeting))
        start, others = time.time(), set(range(self.count)) - {self.rank}
        came = 1
        patience_s = min(WAIT_S, self.every_s / 4)  # who waits into the next meeting misses that, too
        while others and time.time() - start < patience_s:
            for rank in sorted(others):
                if self._file(rank, self.meeting).exists():
                    theirs = torch.load(self._file(rank, self.meeting), mmap=True)
                    came += 1
                    torch._foreach_lerp_(weights, theirs, 1 / came)
                    others.discard(rank)
            time.sleep(PAUSE_S)
        self._file(self.rank, self.meeting - 1).unlink(missing_ok=True)
        return came

    def _file(self, rank: int, meeting: int) -> Path:
        return self.folder / f"{meeting}-{rank}.pt"
