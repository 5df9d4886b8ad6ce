"""Audio of any length through the engine: each window of speech is a request of its own, a few of them at a time.

Finding speech, the requests, and the rules for mending bad answers are the library's (`transcription`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.engine.request import Share
from audioflamingo.errors import AudioFlamingoError
from audioflamingo.server.audio_inputs import limited_audio
from audioflamingo.server.service import Service
from audioflamingo.server.transcription_form import TranscriptionRequest
from audioflamingo.server.window_answers import WindowAnswers
from audioflamingo.transcription.driver import InOrder
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window, part_windows

MAX_WINDOWS = TranscriptionOptions.batch_size  # of one transcription in the engine at a time


class Transcription:
    """One transcription.

    Args:
        service: what it works with.
        request: the audio file, and how it is transcribed.
        share: what it has had of the model.
        arrived: when the request came, by `time.monotonic`.

    Attributes:
        duration_s: seconds of audio that were read so far.
        answers: what the model is asked about the windows.
    """

    def __init__(self, service: Service, request: TranscriptionRequest, share: Share, arrived: float) -> None:
        self._service = service
        options = replace(request.options, adapter=service.adapter_of(request.model))
        self.answers = WindowAnswers(service, options, request.temperature, share, arrived)
        self._blocks = limited_audio(
            request.data, service.settings.max_audio_seconds, request.options.reading
        )
        self.duration_s = 0.0

    async def segments(self) -> AsyncGenerator[Segment, None]:
        """Segments in order, as they come.

        Raises:
            AudioFlamingoError: the audio cannot be read; what came before is yielded first.
        """
        windows = part_windows(self._blocks, self.answers.options, self._note_samples)
        line: InOrder[asyncio.Task[list[Segment]]] = InOrder(asyncio.Task.done)
        error: AudioFlamingoError | None = None
        try:
            while line.has_work:
                if line.may_read(self._has_room(len(line))):
                    try:
                        window = await self._service.decode(next, windows, None)
                    except AudioFlamingoError as caught:
                        error, window = caught, None
                    line.add(None if window is None else self._start(window))
                    continue
                for segment in await line.first:
                    yield segment
                line.pop()
            if error is not None:
                raise error
        finally:
            for task in line:
                task.cancel()
            await asyncio.gather(*line, return_exceptions=True)

    def _has_room(self, num_running: int) -> bool:
        """Whether one more window may be at work beside others of this transcription."""
        return num_running < MAX_WINDOWS and self._service.num_windows < self._service.max_windows

    def _start(self, window: Window) -> asyncio.Task[list[Segment]]:
        task = asyncio.create_task(self.answers.transcribe(window))
        self._service.num_windows += 1
        task.add_done_callback(self._note_window)
        return task

    def _note_window(self, _: asyncio.Task[list[Segment]]) -> None:
        self._service.num_windows -= 1

    def _note_samples(self, num_samples: int) -> None:
        before, self.duration_s = self.duration_s, num_samples / SAMPLING_RATE
        self._service.metrics.audio_seconds.inc(self.duration_s - before)
