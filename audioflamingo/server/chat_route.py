"""`POST /v1/chat/completions`: from the checked request to its answers, and those as OpenAI words them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest

from audioflamingo.config import GenerationConfig
from audioflamingo.engine.generate_options import params_of, resolve_options, sampling_options
from audioflamingo.engine.request import Output, Request
from audioflamingo.engine.sampling import TokenLogprob, Uniforms
from audioflamingo.processor.prompt import Prompt
from audioflamingo.processor.stretches import LongQuestion, Stretch, long_question
from audioflamingo.processor.thoughts import ThoughtSplitter, split_thoughts
from audioflamingo.processor.tokenizer import Tokenizer
from audioflamingo.server.answers import Answers
from audioflamingo.server.api_route import ApiRoute, Call
from audioflamingo.server.audio_inputs import load_clip
from audioflamingo.server.chat_schema import ChatRequest, TextPart, parse_chat
from audioflamingo.server.replies import JsonResponse, send_events

SMALL_BODY = 20_000  # bytes that the event loop parses itself


class ChatRoute(ApiRoute[ChatRequest]):
    """The route."""

    async def read(self, request: HttpRequest) -> ChatRequest:
        """Reads a request."""
        body = await request.body()
        return parse_chat(body) if len(body) <= SMALL_BODY else await self.service.prepare(parse_chat, body)

    async def answer(self, parsed: ChatRequest, call: Call) -> None:
        """Answers it, whole or as a stream."""
        service = self.service
        reply = ChatReply(parsed, service.processor.tokenizer)
        try:
            # Stretches take their time: a stream shows signs of life meanwhile.
            is_late = parsed.stream and parsed.on_long == "windows"
            requests = None if is_late else await self._prepare(parsed, reply, call)
            if parsed.stream:
                await send_events(call.send, self._events(parsed, requests, reply, call))
                return
            assert requests is not None
            outputs = await Answers(service.worker, requests, call.share).complete()
            for output in outputs:
                reply.add(output)
                service.note_answer(call.arrived, output)
            await call.reply(JsonResponse(reply.whole(outputs)))
        finally:
            call.log(**reply.usage, model_s=round(call.share.service_s, 4))

    async def _events(
        self, parsed: ChatRequest, requests: list[Request] | None, reply: ChatReply, call: Call
    ) -> AsyncGenerator[dict[str, Any], None]:
        if requests is None:
            requests = await self._prepare(parsed, reply, call)
        has_begun = False
        async for output in Answers(self.service.worker, requests, call.share):
            if not has_begun:
                has_begun = True
                for choice in range(reply.num_choices):
                    yield reply.first_chunk(choice)
            reply.add(output)
            yield reply.chunk(output)
            if output.is_last:
                self.service.note_answer(call.arrived, output)
        if reply.is_usage_wanted:
            yield reply.usage_chunk()

    async def _prepare(self, chat: ChatRequest, reply: ChatReply, call: Call) -> list[Request]:
        """What the engine is asked for one answer; the stretches of clips that are too long are asked here."""
        service = self.service
        is_any_length = chat.on_long == "windows"
        if not chat.audio_parts:
            requests = await service.prepare(self._build, chat, conversation_of(chat, []))
        else:
            # Few requests at a time hold the waveforms of their clips.
            async with service.long_questions if is_any_length else service.loading:
                messages = conversation_of(chat, await self._load_clips(chat))
                longest_s = service.processor.max_clip_s
                question = long_question(messages, longest_s) if is_any_length else None
                if question is not None:
                    messages = await self._ask_stretches(chat, question, reply, call)
                requests = await service.prepare(self._build, chat, messages)
        reply.add_prompt(requests[0].prompt)
        return requests

    def _build(self, chat: ChatRequest, messages: list[dict[str, Any]]) -> list[Request]:
        service = self.service
        prompt = service.processor.prompt(messages)
        _ = prompt.identity  # hashes the audio here, not in the engine's thread
        requests = engine_requests(chat, prompt, service.generation_config, service.processor.tokenizer)
        for request in requests:
            request.adapter = service.adapter_of(chat.model)
        return requests

    async def _ask_stretches(
        self, chat: ChatRequest, question: LongQuestion, reply: ChatReply, call: Call
    ) -> list[dict[str, Any]]:
        """Asks each stretch of clips that are too long; returns the conversation that is left to answer."""
        alone = chat.model_copy(update={"n": 1, "stream": False, "logprobs": None, "top_logprobs": None})
        for index, messages in enumerate(question.conversations()):
            requests = await self.service.prepare(self._build, alone, messages)
            (output,) = await Answers(self.service.worker, requests, call.share).complete()
            reply.add_stretch(question.stretch(index, output.text), requests[0].prompt, output)
        return question.final(reply.stretches)

    async def _load_clips(self, chat: ChatRequest) -> list[np.ndarray]:
        """The waveforms of all clips, in order."""
        service, clips = self.service, []
        left_s = service.settings.max_audio_seconds
        for field, part in chat.audio_parts:
            longest_s = left_s if chat.on_long == "windows" else min(left_s, service.processor.max_audio_len)
            clip = await service.decode(load_clip, part, field, longest_s, service.fetch_policy)
            duration_s = len(clip) / service.processor.feature_extractor.sampling_rate
            left_s -= duration_s
            service.metrics.audio_seconds.inc(duration_s)
            clips.append(clip)
        return clips


def conversation_of(chat: ChatRequest, clips: list[np.ndarray]) -> list[dict[str, Any]]:
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


def engine_requests(
    chat: ChatRequest, prompt: Prompt, defaults: GenerationConfig, tokenizer: Tokenizer
) -> list[Request]:
    """What the engine is asked for; what the request leaves open is the checkpoint's default.

    Raises:
        ArgumentError: values that do not fit each other.
    """
    num_answers = chat.n or 1
    config = resolve_options(defaults, generate_options(chat, defaults, num_answers))
    limit = config.max_new_tokens or max(1, (config.max_length or 0) - len(prompt))
    params = params_of(config, len(prompt), limit, tokenizer)
    # Answers of their own, so that the scheduler may run few of them at a time; those of a search belong together.
    num_requests = 1 if params.beams is not None else num_answers
    params = replace(params, num_top_logprobs=chat.num_top_logprobs, num_answers=num_answers // num_requests)
    seed = secrets.randbits(63) if chat.seed is None else chat.seed % 2**64
    uniforms = Uniforms(num_answers, seed) if params.rules.do_sample else None
    return [
        Request(prompt, params, is_streamed=bool(chat.stream), uniforms=uniforms, first_row=index)
        for index in range(num_requests)
    ]


def generate_options(chat: ChatRequest, defaults: GenerationConfig, num_answers: int) -> dict[str, Any]:
    """The keywords of `generate` that a request stands for."""
    options: dict[str, Any] = {
        **sampling_options(chat.temperature),
        "repetition_penalty": chat.repetition_penalty,
        "frequency_penalty": chat.frequency_penalty,
        "presence_penalty": chat.presence_penalty,
        "min_new_tokens": chat.min_tokens,
        "max_new_tokens": chat.max_completion_tokens or chat.max_tokens,
        "stop_strings": chat.stops or None,
    }
    if chat.temperature != 0:  # the likeliest token has no use for these
        options |= {"top_p": chat.top_p, "top_k": chat.top_k, "min_p": chat.min_p}
    if options.get("do_sample", defaults.do_sample):
        options["num_beams"] = 1
    elif defaults.num_beams > 1:
        options["num_beams"] = max(defaults.num_beams, num_answers)
        options["num_return_sequences"] = num_answers
    return options


def _message(text: str) -> dict[str, Any]:
    """An answer as a message, its thoughts apart."""
    thoughts, answer = split_thoughts(text)
    message = {"role": "assistant", "content": answer, "refusal": None}
    return message if thoughts is None else {**message, "reasoning_content": thoughts}


class ChatReply:
    """The reply to one request.

    Args:
        chat: the request.
        tokenizer: turns ids into text, for log-probabilities.

    Attributes:
        num_choices: answers that are asked for.
        stretches: parts of long clips with their answers, from which the answers are made.
        is_usage_wanted: whether a stream ends with the usage.
    """

    def __init__(self, chat: ChatRequest, tokenizer: Tokenizer) -> None:
        self.num_choices = chat.n or 1
        self.is_usage_wanted = chat.stream_options is not None and chat.stream_options.include_usage
        self._has_logprobs = bool(chat.logprobs)
        self._tokenizer = tokenizer
        self._num_prompt_tokens = self._num_audio_tokens = 0
        self.stretches: list[Stretch] = []
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": chat.model,
        }
        self._thoughts = [ThoughtSplitter() for _ in range(self.num_choices)]
        self._num_completion_tokens = 0
        self._num_reused: list[int | None] = [None] * self.num_choices

    def add_prompt(self, prompt: Prompt) -> None:
        """Counts what the model reads."""
        self._num_prompt_tokens += len(prompt.token_ids)
        self._num_audio_tokens += prompt.num_audio_tokens

    def add_stretch(self, stretch: Stretch, prompt: Prompt, output: Output) -> None:
        """Takes a part of a long clip that was asked."""
        self.stretches.append(stretch)
        self.add_prompt(prompt)
        self._num_completion_tokens += len(output.token_ids)

    def add(self, output: Output) -> None:
        """Counts an output of an answer."""
        self._num_completion_tokens += len(output.token_ids)
        self._num_reused[output.index] = output.num_reused

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers, those of stretches included."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {
                "audio_tokens": self._num_audio_tokens,
                "cached_tokens": min((n for n in self._num_reused if n is not None), default=0),
            },
        }

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The reply in one piece."""
        choices = [
            {
                "index": output.index,
                "message": _message(output.text),
                "logprobs": self._logprobs(output),
                "finish_reason": output.finish_reason,
            }
            for output in outputs
        ]
        head = {**self._head, **self._stretches, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self.usage}

    @property
    def _stretches(self) -> dict[str, Any]:
        """The parts of a long clip, where there was one."""
        return {"stretches": [stretch.to_dict() for stretch in self.stretches]} if self.stretches else {}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Opens an answer."""
        chunk = self._chunk([self._choice(index, {"role": "assistant", "content": ""})])
        return {**chunk, **self._stretches}

    def chunk(self, output: Output) -> dict[str, Any]:
        """What an answer has grown by."""
        splitter = self._thoughts[output.index]
        pieces = splitter.put(output.text) + (splitter.end() if output.is_last else [])
        delta = {}
        for is_thinking, name in ((True, "reasoning_content"), (False, "content")):
            if text := "".join(piece for is_thoughts, piece in pieces if is_thoughts == is_thinking):
                delta[name] = text
        choice = self._choice(output.index, delta, output.finish_reason)
        choice["logprobs"] = self._logprobs(output)
        return self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any]:
        """Ends a stream."""
        return {**self._chunk([]), "usage": self.usage}

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.is_usage_wanted else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **usage}

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in output.logprobs
            if not self._is_end(entry)
        ]
        return {"content": content, "refusal": None}

    def _is_end(self, entry: TokenLogprob) -> bool:
        """Tokens that leave no text, such as the one that ends an answer, are not reported."""
        return not self._tokenizer.token_bytes(entry.token_id, skip_special_tokens=True)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        # -inf is no JSON number; OpenAI writes such a one as -9999.
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(data),
        }
