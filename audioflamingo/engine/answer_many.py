"""Many requests through one engine, as many at a time as fit: each that is answered makes room for the next at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TypeVar

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.generate import evaluation_mode
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Output, Request
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor.tokenizer import Tokenizer

Key = TypeVar("Key")


def answer_many(
    model: AudioFlamingo3WithHead,
    tokenizer: Tokenizer,
    requests: Iterable[tuple[Key, Request]],
    num_together: int,
    clip_cache: ClipCache | None = None,
) -> Iterator[tuple[Key, Output]]:
    """Answers requests for one answer each.

    Args:
        model: answers.
        tokenizer: its processor's.
        requests: with a key for each; taken as there is room. `on_output` is set here.
        num_together: requests that run at the same time.
        clip_cache: encoded audio that several requests share; by default nothing is kept.

    Yields:
        A key and its whole answer, in the order in which they are complete.

    Raises:
        AudioFlamingoError: an answer failed.
    """
    waiting = iter(requests)
    done: deque[tuple[Key, Output]] = deque()
    num_running = 0
    engine: Engine | None = None
    with evaluation_mode(model):
        while True:
            while num_running < num_together and (item := next(waiting, None)) is not None:
                key, request = item
                if engine is None:
                    num_rows = num_together * request.params.num_sequences
                    cache = clip_cache or ClipCache(max_bytes=0)
                    engine = Engine(model, tokenizer, EngineOptions.alone(num_rows), cache)
                request.is_streamed = False
                request.on_output = partial(_take, done, key)
                engine.submit(request)
                num_running += 1
            if engine is None or not num_running:
                return
            engine.step()
            while done:
                key, output = done.popleft()
                num_running -= 1
                if output.error is not None:
                    raise output.error
                yield key, output


def _take(done: deque[tuple[Key, Output]], key: Key, output: Output) -> None:
    done.append((key, output))
