"""Runs requests through the server's engine and collects their answers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from audioflamingo.engine.engine import Engine
from audioflamingo.engine.request import EngineRequest, Output, Sampling, Share
from audioflamingo.engine.sampling import LogitsRules, row_seed
from audioflamingo.processor.prompt import Prompt

WAIT_S = 60


@dataclass
class Collected:
    """What came of one request."""

    request: EngineRequest
    outputs: list[Output]
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def result(self) -> Output:
        """The last output, once there is one."""
        assert self.done.wait(WAIT_S), "no answer"
        return self.outputs[-1]

    @property
    def text(self) -> str:
        """The whole text."""
        assert self.result.error is None, self.result.error
        return "".join(output.text for output in self.outputs)

    @property
    def token_ids(self) -> list[int]:
        """All tokens."""
        assert self.result.error is None, self.result.error
        return [token for output in self.outputs for token in output.token_ids]


def submit(
    engine: Engine, prompt: Prompt, sampling: Sampling, is_streamed: bool = True, share: Share | None = None
) -> Collected:
    """Starts a request."""
    outputs: list[Output] = []
    done = threading.Event()

    def collect(output: Output) -> None:
        outputs.append(output)
        if output.is_last:
            done.set()

    request = EngineRequest(prompt, sampling, collect, share or Share(), is_streamed=is_streamed)
    engine.submit(request)
    return Collected(request, outputs, done)


def greedy(max_new_tokens: int = 12, **changes: Any) -> Sampling:
    """Greedy decoding."""
    return Sampling(max_new_tokens=max_new_tokens, **changes)


def seeded(seed: int, max_new_tokens: int = 12, **rules: Any) -> Sampling:
    """Seeded sampling."""
    return Sampling(
        rules=LogitsRules(do_sample=True, **rules), seed=row_seed(seed, 0), max_new_tokens=max_new_tokens
    )
