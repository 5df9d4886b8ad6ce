"""The body of a chat request, checked. Nothing that would change the answer is accepted and then ignored."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from audioflamingo.audio.reading import Reading
from audioflamingo.server.error_replies import ApiError, bad_request
from audioflamingo.server.extra_fields import check_extra

OnLong = Literal["error", "windows"]  # ours: what becomes of clips that are longer than the model takes
IMAGES = ("image_url", "input_image", "file", "input_file", "video_url")


class Strict(BaseModel):
    """Types are taken at their word: `"1"` is no number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ClipReading(Strict):
    """How a clip is read; these fields are ours."""

    track: Annotated[int, Field(ge=1)] | None = None
    channel: Literal["mix", "left", "right"] = "mix"
    allow_damaged: bool = False

    @property
    def reading(self) -> Reading:
        """The same for the library."""
        return Reading(self.track, self.channel, self.allow_damaged)


class InputAudio(ClipReading):
    """A clip within the request; `format` is not trusted."""

    data: str
    format: str | None = None


class InputAudioPart(Strict):
    """See `InputAudio`."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(ClipReading):
    """Where a clip is: a `data:` address, or http(s) if the server allows the host."""

    url: str


class AudioUrlPart(Strict):
    """See `AudioUrl`."""

    type: Literal["audio_url"]
    audio_url: AudioUrl


Part = Annotated[TextPart | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


# The branches of a content, as pydantic puts them into the place of an error.
TEXT, PARTS = "a text", "a list of parts"
PART_TYPES = ("text", "input_audio", "audio_url")
CLASS_NAME = re.compile(r"a valid dictionary or instance of \w+")  # what pydantic calls an object


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


class JsonSchema(Strict):
    """A schema that answers must meet, whether `strict` or not."""

    content: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What answers must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.json_schema is None) != (self.type != "json_schema"):
            raise ValueError("json_schema belongs to the type json_schema")
        return self

    @property
    def constraint(self) -> dict[str, Any] | None:
        """The same for the library."""
        if self.json_schema is not None:
            return {"json_schema": self.json_schema.content}
        return {"json_object": True} if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """The same in vLLM's words, with more that an answer may be."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    choice: list[str] | None = None
    regex: str | None = None

    @property
    def constraint(self) -> dict[str, Any]:
        """The same for the library."""
        values = {
            "json_schema": self.json_schema,
            "json_object": self.json_object,
            "choices": self.choice,
            "regex": self.regex,
        }
        return {name: value for name, value in values.items() if value is not None}


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
    on_long: OnLong | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None
    ) = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """Fields that were left aside, because they change nothing."""
        return self._ignored

    def ignore(self, names: list[str]) -> None:
        """Notes that fields are left aside."""
        self._ignored = names

    def biases(self, vocab_size: int) -> dict[int, float] | None:
        """What is added to the logits of some tokens.

        Raises:
            ApiError: 400 for what is no token.
        """
        for name in self.logit_bias or ():
            if not (name.isdecimal() and len(name) < 9 and int(name) < vocab_size):
                message = f"logit_bias: {name[:40]!r} is no token id; they go from 0 to {vocab_size - 1}."
                raise bad_request(message, "logit_bias")
        return (
            None if self.logit_bias is None else {int(name): bias for name, bias in self.logit_bias.items()}
        )

    @property
    def constraint(self) -> dict[str, Any] | None:
        """What answers must be, for the library."""
        wanted = [f.constraint for f in (self.response_format, self.structured_outputs) if f is not None]
        return next((constraint for constraint in wanted if constraint is not None), None)

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
    content = parse_json(body)
    refuse_images(content.get("messages"), "messages")
    try:
        chat = ChatRequest.model_validate(content)
    except ValidationError as error:
        raise as_api_error(error) from None
    chat.ignore(check_extra(chat.model_extra or {}, ChatRequest.model_fields, {}))
    if chat.top_logprobs and not chat.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    if chat.stream_options is not None and not chat.stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    if chat.response_format is not None and chat.structured_outputs is not None:
        raise bad_request("response_format and structured_outputs exclude each other.", "response_format")
    if chat.continue_final_message and chat.messages[-1].role != "assistant":
        raise bad_request(
            "continue_final_message needs a last message of the assistant.", "continue_final_message"
        )
    if (chat.add_generation_prompt is False) != bool(chat.continue_final_message) and (
        chat.add_generation_prompt is not None
    ):
        raise bad_request(
            "add_generation_prompt is false with continue_final_message, and true without.",
            "add_generation_prompt",
        )
    limits = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens contradict each other.", "max_tokens")
    return chat


def parse_json(body: bytes | str, what: str = "the body") -> dict[str, Any]:
    """Reads a body, or what messages call `what`, that must be a JSON object.

    Raises:
        ApiError: 400 if it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        content = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise bad_request("the JSON is nested too deeply.") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise bad_request(f"{what} is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(content, dict):
        raise bad_request(f"{what} must be a JSON object.")
    return content


def refuse_images(messages: Any, field: str) -> None:
    """Says it plainly, where the plain check would list types of parts.

    Raises:
        ApiError: 400.
    """
    for message in messages if isinstance(messages, list) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and part.get("type") in IMAGES:
                raise bad_request(
                    f"{part['type']}: this model hears and reads; send audio and text only.", field
                )


def _fields_of(place: tuple[int | str, ...]) -> list[int | str]:
    """A place in the body without the branches that pydantic puts into it: kinds of content, types of parts."""
    named = [step for step in place if step not in (TEXT, PARTS)]
    is_branch = [isinstance(before, int) and after in PART_TYPES for before, after in pairwise(named)]
    return [step for step, left_out in zip(named, [False, *is_branch], strict=True) if not left_out]


def as_api_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, _fields_of(first["loc"])))
    message = CLASS_NAME.sub("an object", first["msg"])
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        message = f"There is no part of type {context['tag'][:100]!r}, but {context['expected_tags']}"
    elif first["type"] == "union_tag_not_found":
        message = "A part needs a 'type', such as 'input_audio'"
    elif first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        message = "Input should be an object"
    return bad_request(f"{place}: {message}.", place[:200])
