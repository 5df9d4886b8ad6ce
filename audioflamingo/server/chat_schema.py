"""The body of a chat request, checked. Nothing that would change the answer is accepted and then ignored."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from audioflamingo.server.error_replies import ApiError, bad_request

# Fields of OpenAI's that change nothing about an answer.
HARMLESS = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "store", "user"),
)
# Fields that would, with the values at which they do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class Strict(BaseModel):
    """Types are taken at their word: `"1"` is no number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class InputAudio(Strict):
    """A clip within the request; `format` is not trusted."""

    data: str
    format: str | None = None


class InputAudioPart(Strict):
    """See `InputAudio`."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(Strict):
    """Where a clip is: a `data:` address, or http(s) if the server allows the host."""

    url: str


class AudioUrlPart(Strict):
    """See `AudioUrl`."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


Part = Annotated[TextPart | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


# The branches of a content, as pydantic puts them into the place of an error.
TEXT, PARTS = "a text", "a list of parts"


def _kind_of_content(content: Any) -> str | None:
    return TEXT if isinstance(content, str) else PARTS if isinstance(content, list) else None


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[Part], Tag(PARTS)],
    Discriminator(
        _kind_of_content,
        custom_error_type="content",
        custom_error_message=f"Content should be {TEXT} or {PARTS}",
    ),
]


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _empty_answer(cls, message: Any) -> Any:
        """Clients send back an answer without text as null; beside calls of tools it would stand for those."""
        if not isinstance(message, dict) or message.get("role") != "assistant" or "content" not in message:
            return message
        has_more = message.get("tool_calls") or message.get("function_call")
        return message if message["content"] is not None or has_more else {**message, "content": ""}


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    on_long: Literal["error", "windows"] | None = None  # ours, for clips that are longer than the model takes
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def audio_parts(self) -> list[tuple[str, InputAudioPart | AudioUrlPart]]:
        """The clips of all messages in order, each with the name of its field."""
        return [
            (f"messages.{index}.{part.type}", part)
            for index, message in enumerate(self.messages)
            for part in (message.content if isinstance(message.content, list) else ())
            if not isinstance(part, TextPart)
        ]

    @property
    def num_top_logprobs(self) -> int | None:
        """Alternatives to report beside each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_chat(body: bytes) -> ChatRequest:
    """Reads the body of a chat request. Costs time for large bodies: not for the event loop.

    Raises:
        ApiError: 400 that names the field.
    """
    content = _parse_json(body)
    _refuse_images(content)
    try:
        chat = ChatRequest.model_validate(content)
    except ValidationError as error:
        raise _as_api_error(error) from None
    for name, value in (chat.model_extra or {}).items():
        _check_extra(name, value)
    if chat.top_logprobs and not chat.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    if chat.stream_options is not None and not chat.stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens contradict each other.", "max_tokens")
    return chat


def _parse_json(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise bad_request("the JSON is nested too deeply.") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise bad_request(f"the body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object.")
    return content


def _check_extra(name: str, value: Any) -> None:
    if value is None or name in HARMLESS:
        return
    if name in UNSUPPORTED:
        if value not in UNSUPPORTED[name]:
            raise bad_request(f"{name} is not supported; leave it out.", name, "unsupported_parameter")
        return
    known = (*ChatRequest.model_fields, *HARMLESS)
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise bad_request(f"there is no field {name[:100]!r}{hint}.", name[:100], "unknown_parameter")


def _refuse_images(content: dict[str, Any]) -> None:
    """Says it plainly, where the plain check would list types of parts."""
    messages = content.get("messages")
    for message in messages if isinstance(messages, list) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and part.get("type") in ("image_url", "file", "video_url"):
                raise bad_request(
                    f"{part['type']}: this model hears and reads; send audio and text only.", "messages"
                )


def _as_api_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in (TEXT, PARTS))
    message = first["msg"]
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        message = f"There is no part of type {context['tag'][:100]!r}, but {context['expected_tags']}"
    return bad_request(f"{place}: {message}.", place[:200])
