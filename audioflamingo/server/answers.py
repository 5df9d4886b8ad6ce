"""The engine's answers on the event loop: outputs of one or several of them, in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from audioflamingo.engine.engine import Engine
from audioflamingo.engine.request import EngineRequest, Output, Sampling, Share
from audioflamingo.processor.prompt import Prompt


class Answers:
    """Answers to one prompt that are being given.

    Args:
        engine: gives them.
        prompt: what they continue.
        samplings: one for each answer.
        share: the client request that they belong to.
        is_streamed: whether outputs are wanted as the text grows.

    Raises:
        ContextLengthError: the prompt can never fit.
        EngineStoppedError: the engine takes no more.
    """

    def __init__(
        self, engine: Engine, prompt: Prompt, samplings: Sequence[Sampling], share: Share, is_streamed: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._is_woken = False
        self._outputs: deque[tuple[int, Output]] = deque()
        self._requests = [
            EngineRequest(prompt, sampling, self._receiver(index), share, is_streamed)
            for index, sampling in enumerate(samplings)
        ]
        for request in self._requests:
            engine.submit(request)

    def _receiver(self, index: int) -> Callable[[Output], None]:
        def receive(output: Output) -> None:
            self._outputs.append((index, output))
            if not self._is_woken:
                self._is_woken = True
                with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                    self._loop.call_soon_threadsafe(self._ready.set)

        return receive

    def cancel(self) -> None:
        """Drops what is not complete."""
        for request in self._requests:
            request.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        """Yields `(index of the answer, output)` until all are complete; ending early drops the rest.

        Raises:
            AudioFlamingoError: an answer failed.
        """
        num_open = len(self._requests)
        try:
            while num_open:
                await self._ready.wait()
                self._ready.clear()
                self._is_woken = False
                for index, output in self._joined():
                    if output.error is not None:
                        raise output.error
                    num_open -= output.is_last
                    yield index, output
        finally:
            self.cancel()

    def _joined(self) -> list[tuple[int, Output]]:
        """What has come in, several outputs of an answer as one: a slow reader gets fewer and longer pieces."""
        joined: dict[int, Output] = {}
        while self._outputs:
            index, output = self._outputs.popleft()
            joined[index] = output.joined_to(joined.get(index))
        return list(joined.items())

    async def complete(self) -> list[Output]:
        """All answers, each as one output."""
        whole: dict[int, Output] = {}
        async for index, output in self:
            whole[index] = output.joined_to(whole.get(index))
        return [whole[index] for index in range(len(self._requests))]
