"""Routes whose reply are answers of the model: from a chat to requests of the engine, and back in any wording."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from audioflamingo.config import GenerationConfig
from audioflamingo.engine.generate_options import params_of, resolve_options, sampling_options
from audioflamingo.engine.request import Output, Request
from audioflamingo.engine.sampling import TokenLogprob, Uniforms
from audioflamingo.processor.prompt import Prompt
from audioflamingo.processor.stretches import LongQuestion, Stretch, long_question
from audioflamingo.processor.thoughts import ends_in_thoughts
from audioflamingo.processor.tokenizer import Tokenizer
from audioflamingo.server.answers import Answers
from audioflamingo.server.api_route import ApiRoute, Call, NamesModel
from audioflamingo.server.audio_inputs import load_clip
from audioflamingo.server.chat_schema import ChatRequest, TextPart
from audioflamingo.server.replies import JsonResponse, send_events

Parsed = TypeVar("Parsed", bound=NamesModel)

SMALL_BODY = 20_000  # bytes that the event loop parses itself
MAX_THOUGHTS = 1000  # last tokens of a prompt in which thoughts may have begun


class AnswerReply(ABC):
    """What is sent back, in the words of a route.

    Args:
        chat: the request.
        tokenizer: turns ids into text, for log-probabilities.

    Attributes:
        num_choices: answers that are asked for.
        stretches: parts of long clips with their answers, from which the answers are made.
        is_thinking: the prompt ended in thoughts, so the answers begin with the rest of them.
    """

    def __init__(self, chat: ChatRequest, tokenizer: Tokenizer) -> None:
        self.num_choices = chat.n or 1
        self.stretches: list[Stretch] = []
        self.is_thinking = False
        self._has_logprobs = bool(chat.logprobs)
        self._num_prompt_tokens = self._num_audio_tokens = 0
        self._tokenizer = tokenizer
        self._num_completion_tokens = 0
        self._num_reused: list[int | None] = [None] * self.num_choices

    @abstractmethod
    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The reply in one piece."""

    @abstractmethod
    def begin(self) -> list[dict[str, Any]]:
        """Events that open a stream, once the first answer has begun."""

    @abstractmethod
    def news(self, output: Output) -> list[dict[str, Any]]:
        """Events about what an answer has grown by."""

    @abstractmethod
    def end(self) -> list[dict[str, Any]]:
        """Events that end a stream."""

    def add_prompt(self, prompt: Prompt) -> None:
        """Counts what the model reads."""
        self._num_prompt_tokens += len(prompt.token_ids)
        self._num_audio_tokens += prompt.num_audio_tokens
        end = self._tokenizer.decode(prompt.token_ids[-MAX_THOUGHTS:])
        assert isinstance(end, str)
        self.is_thinking = ends_in_thoughts(end)

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

    def logprobs(self, output: Output) -> list[dict[str, Any]]:
        """The log-probabilities of an output's tokens, as OpenAI writes them; those of no text are left out."""
        if not self._has_logprobs:
            return []
        return [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in output.logprobs
            if not self._is_end(entry)
        ]

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


class AnswerRoute(ApiRoute[Parsed]):
    """The half of a route that answers a chat."""

    async def respond(
        self,
        chat: ChatRequest,
        call: Call,
        make_reply: Callable[[ChatRequest, Tokenizer], AnswerReply],
    ) -> None:
        """Answers a chat, whole or as a stream."""
        service = self.service
        if chat.ignored:
            call.log(ignored_fields=chat.ignored)
        reply = make_reply(chat, service.processor.tokenizer)
        try:
            # Stretches take their time: a stream shows signs of life meanwhile.
            is_late = chat.stream and chat.on_long == "windows"
            requests = None if is_late else await self._prepare(chat, reply, call)
            if chat.stream:
                await send_events(call.send, self._events(chat, requests, reply, call))
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
        self, chat: ChatRequest, requests: list[Request] | None, reply: AnswerReply, call: Call
    ) -> AsyncGenerator[dict[str, Any], None]:
        if requests is None:
            requests = await self._prepare(chat, reply, call)
        has_begun = False
        async for output in Answers(self.service.worker, requests, call.share):
            if not has_begun:
                has_begun = True
                for event in reply.begin():
                    yield event
            reply.add(output)
            for event in reply.news(output):
                yield event
            if output.is_last:
                self.service.note_answer(call.arrived, output)
        for event in reply.end():
            yield event

    async def _prepare(self, chat: ChatRequest, reply: AnswerReply, call: Call) -> list[Request]:
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
        prompt = service.processor.prompt(
            messages,
            add_generation_prompt=not chat.continue_final_message,
            continue_final_message=bool(chat.continue_final_message),
        )
        _ = prompt.identity  # hashes the audio here, not in the engine's thread
        requests = engine_requests(chat, prompt, service.generation_config, service.processor.tokenizer)
        for request in requests:
            request.adapter = service.adapter_of(chat.model)
        return requests

    async def _ask_stretches(
        self, chat: ChatRequest, question: LongQuestion, reply: AnswerReply, call: Call
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
    params = params_of(config, len(prompt), limit, tokenizer, chat.constraint, chat.biases(len(tokenizer)))
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
