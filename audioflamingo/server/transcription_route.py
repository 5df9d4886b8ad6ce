"""`POST /v1/audio/transcriptions`: a form to a transcript, in every format."""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from audioflamingo.server.api_route import ApiRoute, Call
from audioflamingo.server.replies import JsonResponse, send_events
from audioflamingo.server.transcription_form import TranscriptionRequest, language_of, parse_form, read_form
from audioflamingo.server.transcription_job import Transcription
from audioflamingo.server.window_answers import WindowAnswers
from audioflamingo.tasks import TASKS
from audioflamingo.transcription.segments import Segment, Word, has_speech
from audioflamingo.transcription.writers import format_transcript, joined_text

UNKNOWN_LANGUAGE = "unknown"  # the model does not say which language it hears
NO_SPEECH = {"X-No-Speech": "true"}  # so that an empty transcript cannot be taken for one that failed
SEEK_FRAMES_PER_S = 100


class TranscriptionRoute(ApiRoute[TranscriptionRequest]):
    """The route."""

    task = "transcribe"

    def instruction(self, form: FormData) -> str:
        """What the model is asked, unless the form says."""
        return self.service.processor.default_transcription_prompt

    async def read(self, request: Request) -> TranscriptionRequest:
        """Reads a request."""
        form = await read_form(request, self.service.settings.max_upload_bytes)
        try:
            return await parse_form(form, self.task, self.instruction(form))
        finally:
            await form.close()

    async def answer(self, parsed: TranscriptionRequest, call: Call) -> None:
        """Answers it, whole or segment by segment."""
        if parsed.ignored:
            call.log(ignored_fields=parsed.ignored)
        work = Transcription(self.service, parsed, call.share, call.arrived)
        try:
            if parsed.is_streamed:
                await send_events(call.send, _events(work))
                return
            segments = [segment async for segment in work.segments()]
            headers = None if has_speech(segments) else NO_SPEECH
            if parsed.response_format == "verbose_json":
                await call.reply(JsonResponse(verbose(segments, work.duration_s, parsed), headers=headers))
            elif parsed.response_format == "json":
                content = {"text": joined_text(segments), "usage": usage_of(work.answers)}
                await call.reply(JsonResponse(content, headers=headers))
            elif parsed.response_format == "text":
                await call.reply(PlainTextResponse(joined_text(segments) + "\n", headers=headers))
            else:
                text = format_transcript(segments, parsed.response_format)
                await call.reply(PlainTextResponse(text, headers=headers))
        finally:
            call.log(
                audio_s=round(work.duration_s, 2),
                prompt_tokens=work.answers.num_text_tokens + work.answers.num_audio_tokens,
                completion_tokens=work.answers.num_output_tokens,
                model_s=round(call.share.service_s, 4),
            )


class TranslationRoute(TranscriptionRoute):
    """`POST /v1/audio/translations`: into English, as a model of the family was trained to be asked."""

    task = "translate"

    def instruction(self, form: FormData) -> str:
        """See `TranscriptionRoute`."""
        source = f"from {language_of(form)} " if language_of(form) else ""
        prompt = TASKS["translate"].prompt.replace("from <src_lang> ", source)
        return prompt.replace("<tgt_lang>", "English")


async def _events(work: Transcription) -> AsyncGenerator[dict[str, Any], None]:
    """The text segment by segment: the sentence around a transcript is gone by then."""
    texts: list[str] = []
    async with aclosing(work.segments()) as segments:
        async for segment in segments:
            if text := joined_text([segment]):
                texts.append(text)
                yield {"type": "transcript.text.delta", "delta": text if len(texts) == 1 else f" {text}"}
    mark = {} if texts else {"no_speech": True}
    yield {"type": "transcript.text.done", "text": " ".join(texts), **mark, "usage": usage_of(work.answers)}


def usage_of(answers: WindowAnswers) -> dict[str, Any]:
    """Tokens of a transcription."""
    num_input = answers.num_text_tokens + answers.num_audio_tokens
    return {
        "type": "tokens",
        "input_tokens": num_input,
        "output_tokens": answers.num_output_tokens,
        "total_tokens": num_input + answers.num_output_tokens,
        "input_token_details": {
            "text_tokens": answers.num_text_tokens,
            "audio_tokens": answers.num_audio_tokens,
        },
    }


def verbose(segments: list[Segment], duration_s: float, request: TranscriptionRequest) -> dict[str, Any]:
    """The reply in the form `verbose_json`."""
    spoken = [segment for segment in segments if segment.text.strip()]
    words = [word for segment in spoken for word in segment.words or ()]
    return {
        "task": request.task,
        "language": request.spoken or UNKNOWN_LANGUAGE,
        "duration": round(duration_s, 3),
        "text": joined_text(spoken),
        "segments": [_verbose_segment(i, segment, request) for i, segment in enumerate(spoken)],
        **({"words": [*map(_verbose_word, words)]} if request.options.word_timestamps else {}),
        "usage": {"type": "duration", "seconds": math.ceil(duration_s)},
    }


def _verbose_word(word: Word) -> dict[str, Any]:
    content = word.to_dict()
    return {
        "word": content["word"],
        "start": content["start_s"],
        "end": content["end_s"],
        "probability": content["probability"],
    }


def _verbose_segment(number: int, segment: Segment, request: TranscriptionRequest) -> dict[str, Any]:
    data = segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start_s * SEEK_FRAMES_PER_S),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        **({} if segment.channel is None else {"channel": segment.channel}),
        **({} if segment.words is None else {"words_certainty": segment.words_certainty}),
        "tokens": list(segment.tokens),
        "temperature": request.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 4),
        "no_speech_prob": None
        if segment.speech_probability is None
        else round(1 - segment.speech_probability, 4),
    }
