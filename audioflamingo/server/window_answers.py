"""What the model says about windows of speech, for every route that transcribes: requests, mended answers, counts."""

from __future__ import annotations

import asyncio
import secrets

from audioflamingo.engine.request import Request, Share
from audioflamingo.server.answers import Answers
from audioflamingo.server.service import Service
from audioflamingo.transcription.driver import WindowRequests, finished, transcribe_window
from audioflamingo.transcription.mending import Answer, segment_of
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window


class WindowAnswers:
    """The answers that belong to one transcript.

    Args:
        service: what it works with.
        options: how to transcribe.
        temperature: 0 takes the most likely tokens.
        share: what the client's request has had of the model.
        arrived: when it came, by `time.monotonic`; None where the time to its first token says nothing.

    Attributes:
        num_text_tokens, num_audio_tokens, num_output_tokens: tokens of all windows so far.
    """

    def __init__(
        self,
        service: Service,
        options: TranscriptionOptions,
        temperature: float,
        share: Share,
        arrived: float | None,
    ) -> None:
        self.options = options
        self._service = service
        self._requests = WindowRequests(service.processor, service.generation_config, options, temperature)
        self._share = share
        self._arrived = arrived
        self.num_text_tokens = self.num_audio_tokens = self.num_output_tokens = 0

    async def transcribe(self, window: Window) -> list[Segment]:
        """The segments of a window, in order."""
        steps = transcribe_window(window, self.options, self._service.processor)
        ask = next(steps)
        while True:
            answers = [self._answer(part, ask.no_repeat_ngram_size) for part in ask.windows]
            try:
                ask = steps.send(list(await asyncio.gather(*answers)))
            except StopIteration as done:
                segments: list[Segment] = done.value
                break
        options, timer = self.options, self._service.word_timer
        return await self._service.prepare(finished, segments, options, timer)

    async def draft(self, window: Window) -> str | None:
        """What the model hears in a window that is not whole yet; None if it makes no sense of it."""
        answer = await self._answer(window, 0)
        return segment_of(window, answer, self._service.processor).text if answer.is_good else None

    async def _answer(self, window: Window, no_repeat_ngram_size: int) -> Answer:
        service = self._service
        request = await service.prepare(self._prepare, window, no_repeat_ngram_size)
        prompt = request.prompt
        self.num_audio_tokens += prompt.num_audio_tokens
        self.num_text_tokens += len(prompt) - prompt.num_audio_tokens
        (output,) = await Answers(service.worker, [request], self._share).complete()
        self.num_output_tokens += len(output.token_ids)
        if self._arrived is not None:
            service.note_answer(self._arrived, output)
            self._arrived = None
        return self._requests.answer(output)

    def _prepare(self, window: Window, no_repeat_ngram_size: int) -> Request:
        request = self._requests.request(window, no_repeat_ngram_size, seed=secrets.randbits(63))
        _ = request.prompt.identity  # hashes the audio here, not in the engine's thread
        return request
