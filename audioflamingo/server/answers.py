"""The engine's answers on the event loop: outputs of one or several of them, in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

from audioflamingo.engine.request import Output, Request, Share
from audioflamingo.engine.worker import EngineWorker


class Answers:
    """The answers to one prompt that are being given.

    Args:
        worker: runs the engine that gives them.
        requests: what is asked, about the same prompt; answers are counted from each one's `first_row` on.
        share: the client request that they belong to.

    Raises:
        ContextLengthError: the prompt can never fit.
        EngineStoppedError: the engine takes no more.
    """

    def __init__(self, worker: EngineWorker, requests: Sequence[Request], share: Share) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._is_woken = False
        self._outputs: deque[Output] = deque()
        self._requests = requests
        self._num_answers = sum(request.params.num_answers for request in requests)
        for request in requests:
            request.share = share
            request.on_output = partial(self._receive, request.first_row)
            worker.submit(request)

    def _receive(self, first: int, output: Output) -> None:
        self._outputs.append(replace(output, index=first + output.index))
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._ready.set)

    def cancel(self) -> None:
        """Drops what is not complete."""
        for request in self._requests:
            request.cancel()

    async def __aiter__(self) -> AsyncIterator[Output]:
        """Yields outputs until all answers are complete; ending early drops the rest.

        Raises:
            AudioFlamingoError: an answer failed.
        """
        num_open = self._num_answers
        try:
            while num_open:
                await self._ready.wait()
                self._ready.clear()
                self._is_woken = False
                for output in self._joined():
                    if output.error is not None:
                        raise output.error
                    num_open -= output.is_last
                    yield output
        finally:
            self.cancel()

    def _joined(self) -> list[Output]:
        """What has come in, several outputs of an answer as one: a slow reader gets fewer and longer pieces."""
        joined: dict[int, Output] = {}
        while self._outputs:
            output = self._outputs.popleft()
            joined[output.index] = output.joined_to(joined.get(output.index))
        return list(joined.values())

    async def complete(self) -> list[Output]:
        """All answers, each as one output."""
        whole: dict[int, Output] = {}
        async for output in self:
            whole[output.index] = output.joined_to(whole.get(output.index))
        return [whole[index] for index in range(self._num_answers)]
