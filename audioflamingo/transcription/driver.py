"""From windows of speech to segments, through the engine: which requests a window needs, and what becomes of answers.

`WindowRequests` makes requests and reads answers; `transcribe_window` says what a window needs, as a generator that
whoever runs the engine drives: `WindowTranscriber` here, where nobody waits, and the server on its event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from audioflamingo.config import GenerationConfig
from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.generate_options import params_of, resolve_options, sampling_options
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.engine.request import Output, Request
from audioflamingo.engine.sampling import Uniforms
from audioflamingo.errors import AudioFlamingoError, warn
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription.mending import Answer, Ask, mend
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window
from audioflamingo.transcription.word_times import WordTimer

Item = TypeVar("Item")


@dataclass(frozen=True)
class WindowRequests:
    """What the engine is asked about windows.

    Attributes:
        processor: makes prompts.
        defaults: the checkpoint's generation config, for what the options leave open.
        options: instruction, length, beams, adapter.
        temperature: 0 takes the most likely tokens.
    """

    processor: AudioFlamingo3Processor
    defaults: GenerationConfig
    options: TranscriptionOptions
    temperature: float = 0.0

    def request(self, window: Window, no_repeat_ngram_size: int, seed: int = 0) -> Request:
        """The request for one window, its log-mel features made; `on_output` is the caller's to set.

        Raises:
            AudioFlamingoError: the window cannot be made a prompt.
        """
        prompt = self.processor.transcription_prompt(window.model_input, self.options.prompt)
        options: dict[str, Any] = {
            **sampling_options(self.temperature),
            "max_new_tokens": self.options.max_new_tokens,
        }
        if self.options.num_beams is not None:
            options["num_beams"] = self.options.num_beams
        if no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = no_repeat_ngram_size
        config = resolve_options(self.defaults, options)
        params = params_of(config, len(prompt), self.options.max_new_tokens, self.processor.tokenizer)
        return Request(
            prompt,
            replace(params, num_answers=1, stops_at_loops=True, num_top_logprobs=0),
            is_streamed=False,
            uniforms=Uniforms(1, [seed]) if params.rules.do_sample else None,
            adapter=self.options.adapter,
        )

    @staticmethod
    def answer(output: Output) -> Answer:
        """What the model said, from the engine's last output."""
        assert output.finish_reason is not None
        logprobs = [entry.logprob for entry in output.logprobs]
        answer = Answer(output.token_ids, logprobs, output.finish_reason)
        answer.find_loop()
        return answer


Transcribing = Generator[Ask, list[Answer], list[Segment]]


def transcribe_window(
    window: Window, options: TranscriptionOptions, processor: AudioFlamingo3Processor
) -> Transcribing:
    """What a window needs from its first request to its segments.

    Yields:
        Windows to be answered; wants a list of as many `Answer`.

    Returns:
        Segments in order.
    """
    (answer,) = yield Ask((window,))
    return (yield from mend(window, answer, options, processor))


def finished(
    segments: list[Segment], options: TranscriptionOptions, timer: WordTimer | None
) -> list[Segment]:
    """Segments with their words, where these are asked for, and without the audio."""
    if timer is not None and options.word_timestamps:
        return [timer.time(segment, options) for segment in segments]
    return [replace(segment, window=None, logprobs=()) for segment in segments]


@dataclass(eq=False)
class WindowJob:
    """One window on its way.

    Attributes:
        steps: see `transcribe_window`.
        requests: those of its requests that are not answered.
        answers: to the present ask, by place.
        segments: the result, once it is there.
        error: why there is none.
    """

    steps: Transcribing
    requests: list[Request] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)
    segments: list[Segment] | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes."""
        return self.segments is not None or self.error is not None


class InOrder(Generic[Item]):
    """What is read ahead and worked on at once, handed out in the order in which it was read.

    Nothing more is read while something can be handed out: whoever waits for it comes first.

    Args:
        is_done: whether an item can be handed out.
    """

    def __init__(self, is_done: Callable[[Item], bool]) -> None:
        self._is_done = is_done
        self._items: deque[Item] = deque()
        self._is_read = False

    @property
    def has_work(self) -> bool:
        """Whether anything is left to read or to hand out."""
        return bool(self._items) or not self._is_read

    def may_read(self, has_room: bool) -> bool:
        """Whether to read on; with nothing on its way, room or not."""
        return not self._is_read and (not self._items or (has_room and not self.is_first_done))

    def add(self, item: Item | None) -> None:
        """Takes what was read; None is the end."""
        if item is None:
            self._is_read = True
        else:
            self._items.append(item)

    @property
    def is_first_done(self) -> bool:
        """Whether the first item can be handed out."""
        return bool(self._items) and self._is_done(self._items[0])

    @property
    def first(self) -> Item:
        """What is handed out next."""
        return self._items[0]

    def pop(self) -> Item:
        """Hands out the first item."""
        return self._items.popleft()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)


class WindowTranscriber:
    """Runs windows through an engine, as many at a time as fit; each that ends makes room for the next at once.

    Where the device runs out of memory it goes on with half as many. What fails beside others is tried again alone, so
    that one window fails alone.

    Args:
        model: answers.
        processor: its processor.
        options: see `TranscriptionOptions`.

    Raises:
        ArgumentError: no adapter has the name that the options give.
    """

    def __init__(
        self,
        model: AudioFlamingo3WithHead,
        processor: AudioFlamingo3Processor,
        options: TranscriptionOptions,
    ) -> None:
        if options.adapter is not None:
            _ = model.adapters[options.adapter]
        self._model = model
        self._processor = processor
        self._options = options
        self._requests = WindowRequests(processor, model.generation_config, options)
        self._num_beams = options.num_beams or model.generation_config.num_beams
        self._num_windows = options.batch_size
        self._jobs: list[WindowJob] = []  # that are not done
        self._waiting: list[WindowJob] = []  # of them, those that failed beside others, to be tried alone
        # Timing words hears each window again: it is kept until then.
        self._clip_cache = ClipCache() if options.word_timestamps else ClipCache(max_bytes=0)
        self._timer = WordTimer(model, processor, self._clip_cache) if options.word_timestamps else None
        self._engine = self._new_engine()

    @property
    def has_room(self) -> bool:
        """Whether one more window would run at once."""
        return not self._waiting and len(self._jobs) < self._num_windows

    @property
    def has_work(self) -> bool:
        """Whether a window is on its way."""
        return bool(self._jobs)

    def start(self, window: Window) -> WindowJob:
        """Takes a window; `step` works on it."""
        job = WindowJob(transcribe_window(window, self._options, self._processor))
        self._jobs.append(job)
        self._ask(job, next(job.steps))
        return job

    def step(self) -> None:
        """Runs the engine once."""
        try:
            self._engine.step()
        except torch.OutOfMemoryError as error:
            self._halve(error)
        except AudioFlamingoError as error:
            self._isolate(error)
        self._jobs = [job for job in self._jobs if not job.is_done]
        if self._waiting and not self._engine.has_work:
            self._submit(self._waiting.pop(0))

    def _new_engine(self) -> Engine:
        options = EngineOptions.alone(self._num_windows * self._num_beams)
        return Engine(self._model, self._processor.tokenizer, options, self._clip_cache)

    def _ask(self, job: WindowJob, ask: Ask) -> None:
        """Sends the requests of an ask."""
        job.answers = {}
        try:
            job.requests = [self._requests.request(w, ask.no_repeat_ngram_size) for w in ask.windows]
        except AudioFlamingoError as error:
            job.error = error
            return
        for place, request in enumerate(job.requests):
            request.on_output = partial(self._take, job, request, place, len(ask.windows))
        self._submit(job)

    def _submit(self, job: WindowJob) -> None:
        for request in job.requests:
            self._engine.submit(request)

    def _take(self, job: WindowJob, request: Request, place: int, num_wanted: int, output: Output) -> None:
        """Takes an answer; when all that were asked for are there, goes on with what they call for."""
        job.requests.remove(request)
        if output.error is not None:
            job.error = output.error
            for other in job.requests:
                other.cancel()
            return
        job.answers[place] = self._requests.answer(output)
        if len(job.answers) < num_wanted:
            return
        try:
            ask = job.steps.send([job.answers[i] for i in range(num_wanted)])
        except StopIteration as done:
            job.segments = finished(done.value, self._options, self._timer)
            return
        self._ask(job, ask)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Begins what is not answered again, half as much at a time."""
        if self._num_windows == 1:
            raise error
        num_together = min(self._num_windows, len(self._jobs))
        self._num_windows = max(1, num_together // 2)
        warn(
            f"the device ran out of memory with {num_together} windows together; going on with "
            f"{self._num_windows}. Pass a smaller batch_size. ({str(error).splitlines()[0]})"
        )
        self._engine = self._new_engine()
        for job in self._jobs:
            self._submit(job)

    def _isolate(self, error: AudioFlamingoError) -> None:
        """Tries each window alone that was at work when something failed; one that was alone has failed."""
        self._engine = self._new_engine()
        at_work = [job for job in self._jobs if job not in self._waiting]
        if len(at_work) == 1:
            at_work[0].error = error
        else:
            self._waiting += at_work
