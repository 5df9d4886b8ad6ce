"""Who gets in: a bounded number of requests at work, a bounded queue, and the orderly end of both."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from audioflamingo.server.error_replies import busy, shutting_down


class Gate:
    """Lets requests in, first come, first served.

    Args:
        max_running: requests at work.
        max_queue: requests that wait, those whose upload is still coming in included.

    Attributes:
        num_running: requests at work.
        num_inside: those and the waiting ones.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self._max_running = max_running
        self._max_inside = max_running + max_queue
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.is_closing = False
        self.num_running = 0
        self.num_inside = 0

    @property
    def num_waiting(self) -> int:
        """Requests that are not at work yet."""
        return self.num_inside - self.num_running

    @contextmanager
    def enter(self) -> Iterator[Pass]:
        """Takes a place in the queue until the end of the block.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server is shutting down.
        """
        if self.is_closing:
            raise shutting_down()
        if self.num_inside >= self._max_inside:
            raise busy(self.num_waiting)
        self.num_inside += 1
        self._is_empty.clear()
        ticket = Pass(self)
        try:
            yield ticket
        finally:
            self.num_inside -= 1
            if ticket.is_running:
                self.num_running -= 1
                self._let_in()
            if not self.num_inside:
                self._is_empty.set()

    async def wait_for_slot(self) -> None:
        """Waits until the request may work.

        Raises:
            ApiError: 503 if the server shuts down before.
        """
        if self.is_closing:
            raise shutting_down()
        if self.num_running < self._max_running and not self._waiting:
            self.num_running += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # let in and gone at once
                self.num_running -= 1
                self._let_in()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _let_in(self) -> None:
        while self._waiting and self.num_running < self._max_running:
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_running += 1
                turn.set_result(None)

    def close(self) -> None:
        """Lets nobody in any more; those who wait are turned away."""
        self.is_closing = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(shutting_down())

    async def wait_until_empty(self) -> None:
        """Waits until the last request has left."""
        await self._is_empty.wait()


class Pass:
    """A request's place in the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.is_running = False

    async def wait_for_slot(self) -> None:
        """See `Gate.wait_for_slot`."""
        await self._gate.wait_for_slot()
        self.is_running = True
