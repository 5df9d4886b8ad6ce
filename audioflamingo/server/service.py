"""What all routes share: the engine, the processor, the limits, and threads for work that would hold up the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from audioflamingo.audio.fetching import FetchPolicy
from audioflamingo.config import GenerationConfig
from audioflamingo.engine.request import Output
from audioflamingo.engine.worker import EngineWorker
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.server.error_replies import ApiError
from audioflamingo.server.gate import Gate
from audioflamingo.server.metrics import Metrics
from audioflamingo.server.server_settings import ServerSettings
from audioflamingo.transcription.word_times import WordTimer

Result = TypeVar("Result")

PREPARE_THREADS = 2  # parsing, templates, log-mel: short work that must not wait behind long files
WINDOWS_PER_ROW = 2  # enough that the engine finds the next one ready
FETCH_TIMEOUT_S = 30.0
MAX_REDIRECTS = 3


class Service:
    """One model behind HTTP.

    Args:
        worker: runs the engine that gives the answers.
        processor: the model's `AudioFlamingo3Processor`.
        generation_config: the checkpoint's defaults for what a request leaves open.
        model_name: what requests call the model.
        settings: limits.

    Attributes:
        loading: held while a request's clips are decoded and prepared, because their waveforms take memory.
        word_timer: tells when words were said.
        long_questions: held in its place by requests whose clips may be of any length, until all of a clip is heard.
        num_windows: windows of all transcriptions that are prepared, wait for the model or are answered.
        max_windows: windows beyond which a transcription reads no further ahead than one, because they take memory.
    """

    def __init__(
        self,
        worker: EngineWorker,
        processor: AudioFlamingo3Processor,
        generation_config: GenerationConfig,
        model_name: str,
        settings: ServerSettings,
    ) -> None:
        self.worker = worker
        self.processor = processor
        self.generation_config = generation_config
        self.model_name = model_name
        self.settings = settings
        self.created = int(time.time())
        self.gate = Gate(settings.max_running + settings.max_queue)
        self.metrics = Metrics(worker.engine, self.gate)
        self.fetch_policy = FetchPolicy(
            settings.max_upload_bytes,
            wait_s=FETCH_TIMEOUT_S,
            total_s=FETCH_TIMEOUT_S,
            allowed_hosts=settings.fetch_hosts,
            max_redirects=MAX_REDIRECTS,
            limit_name="--max-upload-mb",
            advice="Send the audio as base64.",
        )
        self.word_timer = WordTimer(worker.engine.model, processor, worker.engine.clip_cache)
        self.loading = asyncio.Semaphore(settings.decode_threads + PREPARE_THREADS)
        self.long_questions = asyncio.Semaphore(PREPARE_THREADS)
        self.num_windows = 0
        self.max_windows = WINDOWS_PER_ROW * settings.max_rows
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._preparers = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")

    async def decode(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs what decodes or fetches audio, in a thread of a few that do only that."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *arguments)

    async def prepare(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs short blocking work in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._preparers, work, *arguments)

    @property
    def model_names(self) -> list[str]:
        """What requests may name: the model, then its adapters."""
        return [self.model_name, *self.settings.adapter_folders]

    def adapter_of(self, name: str) -> str | None:
        """The adapter that answers to a name; None for the model itself."""
        return None if name == self.model_name else name

    def check_model(self, name: str) -> None:
        """Checks that a request means the model that is served, or an adapter of it.

        Raises:
            ApiError: 404.
        """
        if name not in self.model_names:
            known = ", ".join(map(repr, self.model_names))
            message = f"the model {name[:200]!r} does not exist; this server has {known}."
            raise ApiError(404, message, "model_not_found", "model")

    def note_answer(self, arrived: float, output: Output) -> None:
        """Counts a complete answer."""
        if output.first_token_at is None:
            return
        self.metrics.first_token.observe(output.first_token_at - arrived)
        duration_s = time.monotonic() - output.first_token_at
        num_tokens = len(output.token_ids)
        if num_tokens > 1 and duration_s > 0:
            self.metrics.token_rate.observe((num_tokens - 1) / duration_s)

    async def shut_down(self) -> None:
        """Turns away whom the model has not begun with, gives the others `shutdown_seconds`, then ends."""
        self.gate.close()
        try:
            async with asyncio.timeout(self.settings.shutdown_seconds):
                await self.gate.wait_until_empty()
        except TimeoutError:
            pass
        await asyncio.to_thread(self.worker.stop)
        for executor in (self._decoders, self._preparers):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def is_healthy(self) -> bool:
        """Whether requests have a chance."""
        return self.worker.is_alive and not self.gate.is_closing
