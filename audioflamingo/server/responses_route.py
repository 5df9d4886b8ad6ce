"""`POST /v1/responses`: the same answers in the words of OpenAI's newer interface. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest

from audioflamingo.engine.request import Output
from audioflamingo.processor.thoughts import ThoughtSplitter
from audioflamingo.processor.tokenizer import Tokenizer
from audioflamingo.server.answer_route import SMALL_BODY, AnswerReply, AnswerRoute
from audioflamingo.server.api_route import Call
from audioflamingo.server.chat_schema import ChatRequest
from audioflamingo.server.responses_schema import ResponsesRequest, parse_responses


@dataclass(frozen=True)
class ParsedResponses:
    """A body and the chat that it stands for."""

    request: ResponsesRequest
    chat: ChatRequest

    @property
    def model(self) -> str:
        """The model that it wants."""
        return self.request.model


class ResponsesRoute(AnswerRoute[ParsedResponses]):
    """The route."""

    async def read(self, request: HttpRequest) -> ParsedResponses:
        """Reads a request."""
        body = await request.body()
        is_small = len(body) <= SMALL_BODY
        parsed = parse_responses(body) if is_small else await self.service.prepare(parse_responses, body)
        return ParsedResponses(*parsed)

    async def answer(self, parsed: ParsedResponses, call: Call) -> None:
        """Answers it."""
        await self.respond(parsed.chat, call, partial(ResponsesReply, parsed.request))


class Item:
    """A piece of an answer that grows: its message, or its thoughts.

    Args:
        index: its place in the answer.
        is_thinking: which of the two.
    """

    def __init__(self, index: int, is_thinking: bool) -> None:
        self._kind = "reasoning" if is_thinking else "message"
        self._part_type = "reasoning_text" if is_thinking else "output_text"
        self.is_thinking = is_thinking
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []
        self._id = f"{'rs' if is_thinking else 'msg'}_{secrets.token_hex(12)}"
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._index = index

    def begin(self) -> list[dict[str, Any]]:
        """Events that open it."""
        opened = {**self.content("in_progress"), "content": []}
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": opened},
            {"type": "response.content_part.added", **self._place, "part": self._part()},
        ]

    def grow(self, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Takes more text; events that tell of it."""
        self.text += text
        self.logprobs += logprobs
        event = {"type": f"response.{self._part_type}.delta", **self._place, "delta": text}
        return [event if self.is_thinking else {**event, "logprobs": logprobs}]

    def end(self, status: str) -> list[dict[str, Any]]:
        """Events that close it."""
        done = {"type": f"response.{self._part_type}.done", **self._place, "text": self.text}
        return [
            done if self.is_thinking else {**done, "logprobs": self.logprobs},
            {"type": "response.content_part.done", **self._place, "part": self._part()},
            {"type": "response.output_item.done", "output_index": self._index, "item": self.content(status)},
        ]

    def content(self, status: str) -> dict[str, Any]:
        """The item as it stands in a reply."""
        if self.is_thinking:
            head: dict[str, Any] = {"type": "reasoning", "summary": []}
        else:
            head = {"type": "message", "role": "assistant"}
        return {"id": self._id, **head, "status": status, "content": [self._part()]}

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self._part_type, "text": self.text}
        return part if self.is_thinking else {**part, "annotations": [], "logprobs": self.logprobs}


class ResponsesReply(AnswerReply):
    """The reply to a request.

    Args:
        request: its body.
        chat: the chat that it stands for.
        tokenizer: turns ids into text, for log-probabilities.
    """

    def __init__(self, request: ResponsesRequest, chat: ChatRequest, tokenizer: Tokenizer) -> None:
        super().__init__(chat, tokenizer)
        self._request = request
        self._id = f"resp_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._splitter: ThoughtSplitter | None = None  # made when the prompt is known
        self._items: list[Item] = []
        self._num_events = 0
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back
        self._status = "in_progress"

    def whole(self, outputs: list[Output]) -> dict[str, Any]:
        """The reply in one piece."""
        for output in outputs:
            self.news(output)
        self.end()
        return self._response()

    def begin(self) -> list[dict[str, Any]]:
        """Opens the response."""
        response = self._response()
        kinds = ("response.created", "response.in_progress")
        return self._numbered([{"type": kind, "response": response} for kind in kinds])

    def news(self, output: Output) -> list[dict[str, Any]]:
        """What the answer has grown by."""
        if self._splitter is None:
            self._splitter = ThoughtSplitter(self.is_thinking)
        pieces = self._splitter.put(output.text) + (self._splitter.end() if output.is_last else [])
        self._logprobs += self.logprobs(output)
        events: list[dict[str, Any]] = []
        for is_thinking, text in pieces:
            events += self._turn_to(is_thinking)
            events += self._items[-1].grow(text, self._logprobs)
            self._logprobs = []
        if output.is_last:
            self._status = "incomplete" if output.finish_reason == "length" else "completed"
        return self._numbered(events)

    def end(self) -> list[dict[str, Any]]:
        """Closes the response."""
        events = [] if self._items else self._turn_to(False)
        events += self._items[-1].end(self._status)
        return self._numbered([*events, {"type": f"response.{self._status}", "response": self._response()}])

    def _turn_to(self, is_thinking: bool) -> list[dict[str, Any]]:
        """Lets the piece that is meant be the last one; events that tell of the change."""
        if self._items and self._items[-1].is_thinking == is_thinking:
            return []
        events = self._items[-1].end("completed") if self._items else []
        self._items.append(Item(len(self._items), is_thinking))
        return events + self._items[-1].begin()

    def _numbered(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first, self._num_events = self._num_events, self._num_events + len(events)
        return [{**event, "sequence_number": first + place} for place, event in enumerate(events)]

    def _response(self) -> dict[str, Any]:
        request, is_done = self._request, self._status != "in_progress"
        extra = request.model_extra or {}
        last = len(self._items) - 1
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": extra.get("metadata") or {},
            "model": request.model,
            "output": [
                item.content(self._status if place == last else "completed")
                for place, item in enumerate(self._items)
            ],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": request.text.form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_done else None,
            **({"stretches": [stretch.to_dict() for stretch in self.stretches]} if self.stretches else {}),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage
        thoughts = [item.text for item in self._items if item.is_thinking]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_tokens(thoughts)},
            "total_tokens": usage["total_tokens"],
        }

    def _num_tokens(self, texts: list[str]) -> int:
        """Tokens of some texts, as the tokenizer would write them."""
        return sum(len(self._tokenizer.encode_plain(text)) for text in texts)
