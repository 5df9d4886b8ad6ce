"""Runs requests through an engine in a thread and collects their answers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

from audioflamingo.engine.generate_options import eos_ids
from audioflamingo.engine.request import Output, Request, SamplingParams, Share
from audioflamingo.engine.sampling import LogitsRules, Uniforms
from audioflamingo.engine.stopping import StopRules
from audioflamingo.engine.worker import EngineWorker
from audioflamingo.processor.prompt import Prompt

WAIT_S = 60


@dataclass
class Collected:
    """What came of one request."""

    request: Request
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
    worker: EngineWorker,
    prompt: Prompt,
    params: SamplingParams,
    is_streamed: bool = True,
    share: Share | None = None,
    seed: int = 0,
) -> Collected:
    """Starts a request for one answer, which ends at the model's end-of-sequence tokens."""
    outputs: list[Output] = []
    done = threading.Event()

    def collect(output: Output) -> None:
        outputs.append(output)
        if output.is_last:
            done.set()

    engine: Any = worker.engine
    eos = frozenset(eos_ids(engine._model.generation_config))
    stop = StopRules(eos, params.stop.stop_strings, engine._tokenizer)
    uniforms = Uniforms(1, [seed]) if params.rules.do_sample else None
    request = Request(prompt, replace(params, stop=stop), collect, share or Share(), is_streamed, uniforms)
    worker.submit(request)
    return Collected(request, outputs, done)


def greedy(max_new_tokens: int = 12, stop: tuple[str, ...] = (), **changes: Any) -> SamplingParams:
    """Greedy decoding."""
    return SamplingParams(stop=StopRules(stop_strings=stop), max_new_tokens=max_new_tokens, **changes)


def seeded(max_new_tokens: int = 12, **rules: Any) -> SamplingParams:
    """Sampling; the seed is given to `submit`."""
    return SamplingParams(rules=LogitsRules(do_sample=True, **rules), max_new_tokens=max_new_tokens)
