"""A thread around the engine, for callers who wait elsewhere: requests from any thread, answers through callbacks."""

from __future__ import annotations

import logging
import threading
from collections import deque

import torch

from audioflamingo.engine.engine import Engine
from audioflamingo.engine.memory import give_back_memory
from audioflamingo.engine.request import Request
from audioflamingo.engine.sequence import SequenceGroup
from audioflamingo.errors import EngineStoppedError

logger = logging.getLogger("audioflamingo.engine")
TIDY_AFTER_S = 1.0  # without work


class EngineWorker:
    """`start` it, `submit` requests from any thread, `stop` it.

    Args:
        engine: belongs to the worker's thread from `start` on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._arriving: deque[SequenceGroup] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Takes the memory of the cache and starts the thread."""
        self.engine.warm_up()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Takes a request. Its answers come through `request.on_output`, from the worker's thread.

        Raises:
            ContextLengthError: the prompt can never fit.
            EngineStoppedError: the worker takes no more.
        """
        group = self.engine.prepare(request)
        with self._changed:
            if self._is_stopping:
                raise EngineStoppedError("the engine is shutting down; send the request again.")
            self._arriving.append(group)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread. Answers that are not complete fail with `EngineStoppedError`."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        device = self.engine.model.device
        if device.type == "cuda":  # a new thread's current device is the first one
            torch.cuda.set_device(device)
        scheduler = self.engine.scheduler
        while True:
            if not self._wait(TIDY_AFTER_S):
                give_back_memory()
                self._wait()
            with self._changed:
                arrived = list(self._arriving)
                self._arriving.clear()
                is_stopping = self._is_stopping
            scheduler.add(arrived)
            if is_stopping:
                message = "the engine was shut down before the answer was complete."
                self.engine.fail(scheduler.groups, EngineStoppedError(message))
                return
            try:
                self.engine.step()
            except Exception as error:  # the thread must outlive whatever one step meets
                logger.exception("a step of the model failed")
                self.engine.fail(scheduler.active, error)
                scheduler.prefixes.clear()

    def _wait(self, timeout_s: float | None = None) -> bool:
        """Waits until there is something to do; False when the time was over before."""
        with self._changed:
            return self._changed.wait_for(self._has_work, timeout_s)

    def _has_work(self) -> bool:
        return bool(self._arriving) or self.engine.has_work or self._is_stopping
