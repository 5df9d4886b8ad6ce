"""`POST /v1/audio/transcriptions`."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import zlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from audioflamingo.server.body import LimitedBody, read_form
from audioflamingo.server.error_replies import bad_request, timed_out
from audioflamingo.server.replies import JsonResponse, send_events, send_text, unless_gone
from audioflamingo.server.service import Service
from audioflamingo.server.transcription_job import Transcription, joined
from audioflamingo.transcription.options import TranscriptionOptions
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.writers import format_transcript

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
FIELDS = ("file", "model", "language", "prompt", "instruction", "response_format", "temperature", "stream")
LISTS = ("timestamp_granularities", "include", "chunking_strategy")
LANGUAGE = re.compile(r"[A-Za-z]+([-_][A-Za-z]+)*")
MAX_HINT_CHARACTERS = 4000
UNKNOWN_LANGUAGE = "unknown"  # the model does not say which language it hears
SEEK_FRAMES_PER_S = 100


@dataclasses.dataclass(frozen=True)
class TranscriptionRequest:
    """The form, checked.

    Attributes:
        data: the audio file.
        language: what the client says is spoken; only reported back, the model hears for itself.
        response_format: one of `FORMATS`.
        temperature: 0 takes the most likely tokens.
        is_streamed: send segments as they come.
        options: how to transcribe.
    """

    data: bytes
    language: str | None
    response_format: str
    temperature: float
    is_streamed: bool
    options: TranscriptionOptions


class Transcriptions:
    """The route.

    Args:
        service: what it works with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        service, settings = self._service, self._service.settings
        with service.gate.enter() as ticket:
            body = LimitedBody(scope, receive, settings.max_upload_bytes, settings.upload_timeout_seconds)
            form = await read_form(Request(scope), body, settings.max_upload_bytes)
            try:
                request = await self._check(form)
            finally:
                await form.close()
            try:
                async with asyncio.timeout(settings.timeout_seconds):
                    await unless_gone(receive, ticket.wait_for_slot())
                    await self._answer(scope, receive, send, request)
            except TimeoutError:
                raise timed_out(settings.timeout_seconds) from None

    async def _check(self, form: FormData) -> TranscriptionRequest:
        model = _text(form, "model")
        if model is None:
            raise bad_request("model is missing.", "model")
        self._service.check_model(model)
        for name in form:
            if name not in FIELDS and name.removesuffix("[]") not in LISTS:
                raise bad_request(f"there is no field {name[:100]!r}.", name[:100], "unknown_parameter")
        response_format = _text(form, "response_format") or "json"
        if response_format not in FORMATS:
            raise bad_request(f"response_format must be one of {', '.join(FORMATS)}.", "response_format")
        _check_lists(form, response_format)
        is_streamed = _flag(form, "stream")
        if is_streamed and response_format not in ("json", "text"):
            raise bad_request(
                f"stream gives text only; leave out response_format={response_format}.", "stream"
            )
        language = _text(form, "language")
        if language is not None and not (len(language) <= 40 and LANGUAGE.fullmatch(language)):
            raise bad_request("language must be a code such as 'en'.", "language")
        return TranscriptionRequest(
            data=await _file(form),
            language=language,
            response_format=response_format,
            temperature=_temperature(form),
            is_streamed=is_streamed,
            options=dataclasses.replace(TranscriptionOptions(), prompt=self._instruction(form)),
        )

    def _instruction(self, form: FormData) -> str | None:
        """What the model is asked: `instruction` or its own prompt, with the hint of `prompt` behind it."""
        instruction, hint = _text(form, "instruction"), _text(form, "prompt")
        for name, text in (("instruction", instruction), ("prompt", hint)):
            if text is not None and len(text) > MAX_HINT_CHARACTERS:
                raise bad_request(f"{name} may have {MAX_HINT_CHARACTERS} characters.", name)
        if hint is None:
            return instruction
        return f"{instruction or self._service.processor.default_transcription_prompt} Context: {hint}"

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, request: TranscriptionRequest
    ) -> None:
        work = Transcription(
            self._service, request.data, request.options, request.temperature, scope["state"]["arrived"]
        )
        try:
            if request.is_streamed:
                await send_events(receive, send, _events(work))
                return
            segments = await unless_gone(receive, _collect(work))
            if request.response_format in ("json", "verbose_json"):
                content = {"text": joined(segments), "usage": usage_of(work)}
                if request.response_format == "verbose_json":
                    content = verbose(segments, work.duration_s, request)
                await JsonResponse(content)(scope, receive, send)
            elif request.response_format == "text":
                await send_text(scope, receive, send, joined(segments) + "\n", "text/plain")
            else:
                text = format_transcript(segments, request.response_format)
                await send_text(scope, receive, send, text, "text/plain")
        finally:
            scope["state"]["log"].update(
                audio_s=round(work.duration_s, 2),
                prompt_tokens=work.num_text_tokens + work.num_audio_tokens,
                completion_tokens=work.num_output_tokens,
                model_s=round(work.share.service_s, 4),
            )


async def _collect(work: Transcription) -> list[Segment]:
    return [segment async for segment in work.segments()]


async def _events(work: Transcription) -> AsyncGenerator[dict[str, Any], None]:
    """The text segment by segment: the sentence around a transcript is gone by then."""
    parts: list[str] = []
    async for segment in work.segments():
        text = joined([segment])
        if text:
            parts.append(text)
            yield {"type": "transcript.text.delta", "delta": text if len(parts) == 1 else f" {text}"}
    yield {"type": "transcript.text.done", "text": " ".join(parts), "usage": usage_of(work)}


def usage_of(work: Transcription) -> dict[str, Any]:
    """Tokens of a transcription."""
    num_input = work.num_text_tokens + work.num_audio_tokens
    return {
        "type": "tokens",
        "input_tokens": num_input,
        "output_tokens": work.num_output_tokens,
        "total_tokens": num_input + work.num_output_tokens,
        "input_token_details": {
            "text_tokens": work.num_text_tokens,
            "audio_tokens": work.num_audio_tokens,
        },
    }


def verbose(segments: list[Segment], duration_s: float, request: TranscriptionRequest) -> dict[str, Any]:
    """The reply in the form `verbose_json`."""
    spoken = [segment for segment in segments if segment.text.strip()]
    return {
        "task": "transcribe",
        "language": request.language or UNKNOWN_LANGUAGE,
        "duration": round(duration_s, 3),
        "text": joined(spoken),
        "segments": [_verbose_segment(i, segment, request) for i, segment in enumerate(spoken)],
        "usage": {"type": "duration", "seconds": math.ceil(duration_s)},
    }


def _verbose_segment(number: int, segment: Segment, request: TranscriptionRequest) -> dict[str, Any]:
    data = segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start_s * SEEK_FRAMES_PER_S),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": request.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 4),
        "no_speech_prob": None
        if segment.speech_probability is None
        else round(1 - segment.speech_probability, 4),
    }


def _text(form: FormData, name: str) -> str | None:
    """A field's text; None if it is absent or empty."""
    values = form.getlist(name)
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        raise bad_request(f"{name} must be given once, as text.", name)
    return str(values[0]) if values and values[0] else None


def _flag(form: FormData, name: str) -> bool:
    text = (_text(form, name) or "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise bad_request(f"{name} must be true or false.", name)
    return text in ("true", "1")


def _temperature(form: FormData) -> float:
    text = _text(form, "temperature") or "0"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise bad_request("temperature must be a number from 0 to 1.", "temperature")
    return value


async def _file(form: FormData) -> bytes:
    """The audio. Its name is not looked at."""
    files = form.getlist("file")
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise bad_request("there must be one part 'file' with the audio.", "file")
    data = await files[0].read()
    if not data:
        raise bad_request("the file is empty.", "file", "invalid_audio")
    return data


def _check_lists(form: FormData, response_format: str) -> None:
    values = {
        name: [str(value) for key in (name, f"{name}[]") for value in form.getlist(key)] for name in LISTS
    }
    wanted = values["timestamp_granularities"]
    if wanted and response_format != "verbose_json":
        raise bad_request(
            "timestamp_granularities need response_format=verbose_json.", "timestamp_granularities"
        )
    if "word" in wanted:
        raise bad_request(
            "word times need an aligner, which this server does not have; ask for 'segment'.",
            "timestamp_granularities",
            "unsupported_parameter",
        )
    if any(value != "segment" for value in wanted):
        raise bad_request("timestamp_granularities may hold 'segment'.", "timestamp_granularities")
    if values["include"]:
        raise bad_request("include is not supported; leave it out.", "include", "unsupported_parameter")
    if any(value != "auto" for value in values["chunking_strategy"]):
        raise bad_request("chunking_strategy may be 'auto'.", "chunking_strategy", "unsupported_parameter")
