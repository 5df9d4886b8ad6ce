"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from audioflamingo.audio.fetching import fetch
from audioflamingo.engine.generate_call import logits_rules
from audioflamingo.engine.generate_options import resolve_options
from audioflamingo.engine.request import Sampling, Share
from audioflamingo.engine.sampling import row_seed
from audioflamingo.processor.prompt import Prompt, build_prompt
from audioflamingo.server.answers import Answers
from audioflamingo.server.audio_inputs import decode_base64, load_clip
from audioflamingo.server.body import LimitedBody, parse_json, read_body
from audioflamingo.server.chat_replies import ChatReply
from audioflamingo.server.error_replies import timed_out
from audioflamingo.server.replies import JsonResponse, send_events, unless_gone
from audioflamingo.server.schemas import AudioUrlPart, ChatRequest, InputAudioPart, TextPart, parse_chat
from audioflamingo.server.service import Service

SMALL_BODY = 20_000  # bytes that the event loop parses itself


@dataclass
class PreparedChat:
    """A chat request that the engine can take."""

    prompt: Prompt
    samplings: list[Sampling]


class ChatCompletions:
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
            body = await read_body(
                LimitedBody(scope, receive, settings.max_upload_bytes, settings.upload_timeout_seconds)
            )
            chat = await self._parse(body)
            service.check_model(chat.model)
            try:
                async with asyncio.timeout(settings.timeout_seconds):
                    await unless_gone(receive, ticket.wait_for_slot())
                    prepared = await unless_gone(receive, self._prepare(chat))
                    await self._answer(scope, receive, send, chat, prepared)
            except TimeoutError:
                raise timed_out(settings.timeout_seconds) from None

    async def _parse(self, body: bytes) -> ChatRequest:
        def parse() -> ChatRequest:
            return parse_chat(parse_json(body))

        return parse() if len(body) <= SMALL_BODY else await self._service.prepare(parse)

    async def _prepare(self, chat: ChatRequest) -> PreparedChat:
        service = self._service
        clips = await self._load_clips(chat)
        messages = conversation_of(chat, clips)

        def build() -> PreparedChat:
            prompt = build_prompt(service.processor, messages)
            return PreparedChat(prompt, samplings_of(chat, service.generation_config, len(prompt.token_ids)))

        return await service.prepare(build)

    async def _load_clips(self, chat: ChatRequest) -> list[Any]:
        """The waveforms of all clips, in order."""
        service, clips = self._service, []
        left_s = service.settings.max_audio_seconds
        for index, message in enumerate(chat.messages):
            for part in message.content if isinstance(message.content, list) else []:
                if isinstance(part, TextPart):
                    continue
                field = f"messages.{index}.{part.type}"
                longest_s = min(left_s, service.processor.max_audio_len)
                clip = await service.decode(self._load_clip, part, longest_s, field)
                duration_s = len(clip) / service.processor.feature_extractor.sampling_rate
                left_s -= duration_s
                service.metrics.audio_seconds.inc(duration_s)
                clips.append(clip)
        return clips

    def _load_clip(self, part: InputAudioPart | AudioUrlPart, max_seconds: float, field: str) -> Any:
        if isinstance(part, InputAudioPart):
            data = decode_base64(part.input_audio.data, field)
        elif part.audio_url.url[:5].lower() == "data:":
            data = decode_base64(part.audio_url.url, field)
        else:
            data = fetch(part.audio_url.url, self._service.fetch_policy).read()
        return load_clip(data, max_seconds, field)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, chat: ChatRequest, prepared: PreparedChat
    ) -> None:
        service, share = self._service, Share()
        reply = ChatReply(chat, prepared.prompt, service.model_name, service.processor.tokenizer)
        fields: dict[str, Any] = scope["state"]["log"]
        answers = Answers(service.engine, prepared.prompt, prepared.samplings, share, bool(chat.stream))
        try:
            if chat.stream:
                await send_events(receive, send, self._events(answers, reply, scope))
            else:
                outputs = await unless_gone(receive, answers.complete())
                for index, output in enumerate(outputs):
                    reply.add(index, output)
                    service.note_answer(scope["state"]["arrived"], output)
                await JsonResponse(reply.whole(outputs))(scope, receive, send)
        finally:
            answers.cancel()
            fields.update(reply.usage, model_s=round(share.service_s, 4))

    async def _events(
        self, answers: Answers, reply: ChatReply, scope: Scope
    ) -> AsyncGenerator[dict[str, Any], None]:
        for index in range(reply.num_choices):
            yield reply.first_chunk(index)
        async for index, output in answers:
            reply.add(index, output)
            yield reply.chunk(index, output)
            if output.is_last:
                self._service.note_answer(scope["state"]["arrived"], output)
        if reply.is_usage_wanted:
            yield reply.usage_chunk()


def conversation_of(chat: ChatRequest, clips: list[Any]) -> list[dict[str, Any]]:
    """The messages as the processor takes them, with the clips where they belong."""
    remaining = iter(clips)
    messages = []
    for message in chat.messages:
        role = "system" if message.role == "developer" else message.role
        content: Any = message.content
        if isinstance(content, list):
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "audio", "audio": next(remaining)}
                for part in content
            ]
        messages.append({"role": role, "content": content})
    return messages


def samplings_of(chat: ChatRequest, generation_config: Any, num_prompt_tokens: int) -> list[Sampling]:
    """How each of the `n` answers is chosen; what the request leaves open is the checkpoint's default.

    Raises:
        ArgumentError: values that do not fit each other.
    """
    names = ("top_p", "top_k", "min_p", "repetition_penalty")
    options: dict[str, Any] = {name: value for name in names if (value := getattr(chat, name)) is not None}
    options["num_beams"] = 1  # whatever the checkpoint's default: answers share batches step by step
    options["min_new_tokens"] = chat.min_tokens
    options["max_new_tokens"] = chat.max_completion_tokens or chat.max_tokens
    if chat.temperature is not None:
        options["do_sample"] = chat.temperature > 0
        if chat.temperature > 0:
            options["temperature"] = chat.temperature
    if options.get("do_sample") is False:  # a greedy choice has no use for these
        options = {name: value for name, value in options.items() if name not in ("top_p", "top_k", "min_p")}
    config = resolve_options("chat completions", generation_config, options)
    if config.max_new_tokens is not None:
        limit = config.max_new_tokens
    else:
        limit = max(1, (config.max_length or 0) - num_prompt_tokens)
    seed = secrets.randbits(63) if chat.seed is None else chat.seed % 2**64
    return [
        Sampling(
            rules=logits_rules(config, num_prompt_tokens),
            frequency_penalty=chat.frequency_penalty or 0.0,
            presence_penalty=chat.presence_penalty or 0.0,
            seed=row_seed(seed, choice),
            stop=chat.stops,
            max_new_tokens=limit,
            num_top_logprobs=chat.num_top_logprobs,
        )
        for choice in range(chat.n or 1)
    ]
