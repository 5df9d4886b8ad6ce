"""`POST /v1/chat/completions`: answers as OpenAI words them."""

from __future__ import annotations

import secrets
import time
from typing import Any

from starlette.requests import Request as HttpRequest

from audioflamingo.engine.request import Output
from audioflamingo.processor.thoughts import ThoughtSplitter, split_thoughts
from audioflamingo.processor.tokenizer import Tokenizer
from audioflamingo.server.answer_route import SMALL_BODY, AnswerReply, AnswerRoute
from audioflamingo.server.api_route import Call
from audioflamingo.server.chat_schema import ChatRequest, parse_chat


class ChatRoute(AnswerRoute[ChatRequest]):
    """The route."""

    async def read(self, request: HttpRequest) -> ChatRequest:
        """Reads a request."""
        body = await request.body()
        return parse_chat(body) if len(body) <= SMALL_BODY else await self.service.prepare(parse_chat, body)

    async def answer(self, parsed: ChatRequest, call: Call) -> None:
        """Answers it."""
        await self.respond(parsed, call, ChatReply)


def _message(text: str, is_thinking: bool) -> dict[str, Any]:
    """An answer as a message, its thoughts apart."""
    thoughts, answer = split_thoughts(text, is_thinking)
    message = {"role": "assistant", "content": answer, "refusal": None}
    return message if thoughts is None else {**message, "reasoning_content": thoughts}


class ChatReply(AnswerReply):
    """The reply to a chat request."""

    def __init__(self, chat: ChatRequest, tokenizer: Tokenizer) -> None:
        super().__init__(chat, tokenizer)
        self._is_usage_wanted = chat.stream_options is not None and chat.stream_options.include_usage
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": chat.model,
        }
        self._thoughts: list[ThoughtSplitter] = []

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The reply in one piece."""
        choices = [
            {
                "index": output.index,
                "message": _message(output.text, self.is_thinking),
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

    def begin(self) -> list[dict[str, Any]]:
        """Opens each answer."""
        self._thoughts = [ThoughtSplitter(self.is_thinking) for _ in range(self.num_choices)]
        first = {"role": "assistant", "content": ""}
        chunks = [self._chunk([self._choice(index, first)]) for index in range(self.num_choices)]
        return [{**chunk, **self._stretches} for chunk in chunks]

    def news(self, output: Output) -> list[dict[str, Any]]:
        """What an answer has grown by."""
        splitter = self._thoughts[output.index]
        pieces = splitter.put(output.text) + (splitter.end() if output.is_last else [])
        delta = {}
        for is_thinking, name in ((True, "reasoning_content"), (False, "content")):
            if text := "".join(piece for is_thoughts, piece in pieces if is_thoughts == is_thinking):
                delta[name] = text
        choice = self._choice(output.index, delta, output.finish_reason)
        choice["logprobs"] = self._logprobs(output)
        return [self._chunk([choice])]

    def end(self) -> list[dict[str, Any]]:
        """The usage, if it is asked for."""
        return [{**self._chunk([]), "usage": self.usage}] if self._is_usage_wanted else []

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._is_usage_wanted else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **usage}

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        return {"content": self.logprobs(output), "refusal": None} if self._has_logprobs else None
