"""A live session: what a client sends is heard as it comes, and every stretch of speech is told as an item.

Stretches of speech are requests of the engine like any other, a few of them at a time, and are told in order. While
speech goes on it is heard again and again; the words that two hearings agree on are told at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.engine.request import Share
from audioflamingo.errors import AudioError, AudioFlamingoError
from audioflamingo.server.audio_inputs import decode_base64
from audioflamingo.server.chat_schema import parse_json
from audioflamingo.server.error_replies import ApiError, as_api_error, bad_request, internal_error
from audioflamingo.server.realtime_input import Found, SoundInput
from audioflamingo.server.realtime_schema import LiveConfig, from_flat
from audioflamingo.server.service import Service
from audioflamingo.server.transcription_form import with_hint
from audioflamingo.server.transcription_route import usage_of
from audioflamingo.server.window_answers import WindowAnswers
from audioflamingo.transcription.live import Agreement, SpeechStarted
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from audioflamingo.transcription.windows import Window
from audioflamingo.transcription.writers import joined_text

logger = logging.getLogger("audioflamingo.server")

MAX_APPEND_BYTES = 15 * 2**20  # of base64, as OpenAI's
MIN_COMMIT_S = 0.1
WINDOWS_AT_ONCE = 4  # of one session in the engine
TRANSCRIPTION = "conversation.item.input_audio_transcription"

Result = TypeVar("Result")
SendEvent = Callable[[dict[str, Any]], Awaitable[None]]


class Item:
    """A stretch of speech, or what was committed at once.

    Args:
        answers: what the model is asked about it.
        drafts: what it is asked while the speech goes on.
    """

    def __init__(self, answers: WindowAnswers, drafts: WindowAnswers) -> None:
        self.id = new_id("item")
        self.answers = answers
        self.drafts = drafts
        self.agreement = Agreement()
        self.heard: list[asyncio.Task[list[Segment]]] = []
        self.drafted_s = 0.0  # seconds of it that the last draft heard


class LiveSession:
    """One session.

    Args:
        service: what it works with.
        model: that the client wants.
        send: tells the client an event.
        share: what the session has had of the model.
        is_old: whether the client speaks the older interface.
    """

    def __init__(self, service: Service, model: str, send: SendEvent, share: Share, is_old: bool) -> None:
        self._service = service
        self._model = model
        self._send = send
        self._share = share
        self._is_old = is_old
        self._config = LiveConfig()
        self._input = SoundInput(self._config.input)
        self._about = {
            "id": new_id("sess"),
            "object": "realtime.transcription_session",
            "expires_at": int(time.time() + service.settings.timeout_seconds),
        }
        self._open: Item | None = None  # the speech that goes on
        self._last_id: str | None = None
        self._waiting_s = 0.0  # audio that is committed and not heard yet
        self._slots = asyncio.Semaphore(WINDOWS_AT_ONCE)
        self._to_tell: asyncio.Queue[Item] = asyncio.Queue()
        self._draft: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def audio_s(self) -> float:
        """Seconds of audio that came in."""
        return self._input.num_samples / SAMPLING_RATE

    async def begin(self) -> None:
        """Tells the client that the session is open."""
        self._start(self._tell_items())
        await self._tell_config("created")

    async def handle(self, text: str) -> None:
        """Takes an event of the client; what is wrong with it is told, and the session goes on."""
        event: dict[str, Any] = {}
        try:
            event = parse_json(text, "the event")
            kind = str(event.get("type"))[:100]
            handlers = self._handlers
            if kind not in handlers:
                known = ", ".join(handlers)
                message = f"there is no event of the type {kind!r} for this session; known: {known}."
                raise bad_request(message, "type", "invalid_value")
            await handlers[kind](event)
        except (ApiError, AudioFlamingoError) as error:
            await self.tell_error(error, event.get("event_id"))

    async def finish(self) -> None:
        """Hears to its end what has been said."""
        await self._take(await self._service.prepare(self._input.commit))
        await self._to_tell.join()

    async def close(self) -> None:
        """Drops what is not told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def tell_error(self, error: Exception, event_id: Any = None) -> None:
        """Tells the client what went wrong."""
        content = self._error(error)
        content["event_id"] = event_id if isinstance(event_id, str) else None
        await self._tell("error", error=content)

    async def _tell(self, kind: str, **content: Any) -> None:
        await self._send({"type": kind, "event_id": new_id("event"), **content})

    async def _tell_config(self, what: str, is_old: bool | None = None) -> None:
        is_old = self._is_old if is_old is None else is_old
        show = self._config.shown_flat if is_old else self._config.shown
        kind = "transcription_session" if is_old else "session"
        await self._tell(f"{kind}.{what}", session=show(self._about, self._model))

    @property
    def _handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[None]]]:
        """What the client may send."""
        return {
            "session.update": self._update,
            "transcription_session.update": self._update_flat,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }

    async def _update(self, event: dict[str, Any]) -> None:
        await self._reconfigure(_session_of(event))
        await self._tell_config("updated", is_old=False)

    async def _update_flat(self, event: dict[str, Any]) -> None:
        await self._reconfigure(from_flat(_session_of(event)))
        await self._tell_config("updated", is_old=True)

    async def _reconfigure(self, changes: dict[str, Any]) -> None:
        config = self._config.updated(changes)
        model = config.input.transcription.model
        if model is not None:
            self._service.check_model(model)
        found = await self._service.prepare(self._input.configure, config.input)
        await self._take(found)
        self._config = config

    async def _append(self, event: dict[str, Any]) -> None:
        text = event.get("audio")
        if not isinstance(text, str):
            raise bad_request("audio must be base64 text.", "audio", "invalid_value")
        if len(text) > MAX_APPEND_BYTES:
            raise bad_request(
                f"audio has {len(text)} bytes of base64; an event may have {MAX_APPEND_BYTES}. "
                "None of it was taken.",
                "audio",
                "string_above_max_length",
            )
        data = decode_base64(text, "audio")
        new_s = self._input.duration_s(data)
        self._check_room(new_s)
        try:
            found = await self._service.prepare(self._input.put, data)
        except AudioError as error:
            raise bad_request(f"audio: {error} None of it was taken.", "audio", "invalid_value") from None
        self._service.metrics.audio_seconds.inc(new_s)
        await self._take(found)
        self._start_draft()

    def _check_room(self, new_s: float) -> None:
        """Checks that what waits to be heard stays within bounds.

        Raises:
            ApiError: it does not; nothing is taken.
        """
        waiting_s = self._waiting_s + self._input.kept_s
        limits = self._service.settings
        if waiting_s + new_s > limits.live_buffer_seconds:
            raise ApiError(
                429,
                f"{waiting_s:.1f} s of audio wait to be heard or committed already, and at most "
                f"{limits.live_buffer_seconds:g} s may; these {new_s:.1f} s were not taken. Send them again "
                "later, commit more often, or send no faster than it is spoken.",
                "input_audio_buffer_full",
                "audio",
            )
        if self.audio_s + new_s > limits.max_audio_seconds:
            message = f"a session may have {limits.max_audio_seconds:g} s of audio; these {new_s:.1f} s were not taken."
            raise bad_request(message, "audio", "audio_too_long")

    async def _commit(self, _: dict[str, Any]) -> None:
        has_turns = self._config.input.turn_detection is not None
        kept_s = self._input.kept_s
        if (self._open is None) if has_turns else (kept_s < MIN_COMMIT_S):
            what = "speech" if has_turns else "audio"
            raise bad_request(
                f"the buffer is too small to commit: it has {kept_s * 1000:.0f} ms of {what}, and at least "
                f"{MIN_COMMIT_S * 1000:.0f} ms are needed.",
                code="input_audio_buffer_commit_empty",
            )
        found = await self._service.prepare(self._input.commit)
        if has_turns:
            await self._take(found)
        else:
            await self._commit_item(self._new_item(), [w for w in found if isinstance(w, Window)])

    async def _clear(self, _: dict[str, Any]) -> None:
        await self._service.prepare(self._input.clear)
        self._drop_draft()
        self._open = None
        await self._tell("input_audio_buffer.cleared")

    async def _take(self, found: Found) -> None:
        """Tells what has begun and what has ended."""
        for news in found:
            if isinstance(news, SpeechStarted):
                self._open = self._new_item()
                await self._tell(
                    "input_audio_buffer.speech_started",
                    item_id=self._open.id,
                    audio_start_ms=round(news.start / SAMPLING_RATE * 1000),
                )
            elif self._open is None:  # committed without turn detection
                await self._commit_item(self._new_item(), [news])
            else:
                item, self._open = self._open, None
                self._drop_draft()
                await self._tell(
                    "input_audio_buffer.speech_stopped",
                    item_id=item.id,
                    audio_end_ms=round(news.end_s * 1000),
                )
                await self._commit_item(item, [news])

    def _new_item(self) -> Item:
        service, wanted = self._service, self._config.input.transcription
        default = service.processor.default_transcription_prompt
        options = TranscriptionOptions(
            prompt=with_hint(default, wanted.prompt),
            adapter=service.adapter_of(wanted.model or self._model),
        )
        answers, drafts = (WindowAnswers(service, options, 0.0, self._share, None) for _ in range(2))
        return Item(answers, drafts)

    async def _commit_item(self, item: Item, windows: list[Window]) -> None:
        previous, self._last_id = self._last_id, item.id
        for window in windows:
            self._waiting_s += len(window.waveform) / SAMPLING_RATE
            item.heard.append(self._start(self._hear(item, window)))
        place = {"item_id": item.id, "previous_item_id": previous}
        await self._tell("input_audio_buffer.committed", **place)
        content = [{"type": "input_audio", "transcript": None}]
        about = {"object": "realtime.item", "type": "message", "role": "user", "status": "completed"}
        for kind in ("created",) if self._is_old else ("added", "done"):
            await self._tell(
                f"conversation.item.{kind}",
                previous_item_id=previous,
                item={"id": item.id, **about, "content": content},
            )
        self._to_tell.put_nowait(item)

    async def _hear(self, item: Item, window: Window) -> list[Segment]:
        try:
            async with self._slots:
                return await item.answers.transcribe(window)
        finally:
            self._waiting_s -= len(window.waveform) / SAMPLING_RATE

    async def _tell_items(self) -> None:
        """Tells the items in their order, each as soon as it is heard."""
        while True:
            item = await self._to_tell.get()
            try:
                await self._tell_item(item)
            except OSError:  # the client has gone
                pass
            except Exception as error:
                await self._tell(
                    f"{TRANSCRIPTION}.failed", item_id=item.id, content_index=0, error=self._error(error)
                )
            finally:
                self._to_tell.task_done()

    async def _tell_item(self, item: Item) -> None:
        texts: list[str] = []
        for task in item.heard:
            if text := joined_text(await task):
                texts.append(text)
                await self._tell_more(item, item.agreement.end(" ".join(texts)))
        await self._tell(
            f"{TRANSCRIPTION}.completed",
            item_id=item.id,
            content_index=0,
            transcript=" ".join(texts),
            usage=usage_of(item.answers),
        )

    async def _tell_more(self, item: Item, text: str) -> None:
        if text:
            await self._tell(f"{TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=text)

    def _start_draft(self) -> None:
        """Hears the speech that goes on, if there is enough new of it and nothing else is to be heard."""
        every_s, item = self._config.input.transcription.draft_every_s, self._open
        is_busy = self._waiting_s > 0 or (self._draft is not None and not self._draft.done())
        if every_s is None or item is None or is_busy:
            return
        window = self._input.open_window()
        if window is None or (spoken_s := len(window.waveform) / SAMPLING_RATE) - item.drafted_s < every_s:
            return
        item.drafted_s = spoken_s
        self._draft = self._start(self._hear_draft(item, window))

    async def _hear_draft(self, item: Item, window: Window) -> None:
        try:
            text = await item.drafts.draft(window)
            if text is not None and self._open is item:
                await self._tell_more(item, item.agreement.add(text))
        except AudioFlamingoError:  # it will be told when the speech has ended, if it comes again
            return
        except OSError:  # the client has gone
            return

    def _drop_draft(self) -> None:
        if self._draft is not None:
            self._draft.cancel()

    def _error(self, error: BaseException) -> dict[str, Any]:
        found = as_api_error(error)
        if found is None:
            logger.error("a live session failed", exc_info=error)
            found = internal_error(str(self._about["id"]))
        content: dict[str, Any] = found.body["error"]
        return content


def _session_of(event: dict[str, Any]) -> dict[str, Any]:
    session = event.get("session")
    if not isinstance(session, dict):
        raise bad_request("session must be an object.", "session", "invalid_value")
    return session


def new_id(kind: str) -> str:
    """A name for something that nothing else has."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"
