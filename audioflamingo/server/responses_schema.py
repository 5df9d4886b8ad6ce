"""The body of `POST /v1/responses`, checked, and the chat that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from audioflamingo.server.chat_schema import (
    AudioUrlPart,
    ChatRequest,
    InputAudioPart,
    Message,
    OnLong,
    ResponseFormat,
    Strict,
    TextPart,
    as_api_error,
    parse_json,
    refuse_images,
)
from audioflamingo.server.error_replies import bad_request
from audioflamingo.server.extra_fields import check_extra

LOGPROBS = "message.output_text.logprobs"
# What `include` may hold that this model never has.
NOTHING_TO_INCLUDE = ("reasoning.encrypted_content",)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "truncation": ("disabled",),
    "stream_options": ({}, {"include_obfuscation": False}),
}


class PlainText(Strict):
    """A piece of text, of a question or an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str


Part = Annotated[PlainText | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


class InputMessage(Strict):
    """One turn; earlier answers may be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def message(self) -> Message:
        """The same as a turn of a chat."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        parts = [TextPart(type="text", text=p.text) if isinstance(p, PlainText) else p for p in self.content]
        return Message(role=self.role, content=parts)


class TextFormat(Strict):
    """What answers must be: `ResponseFormat` with the schema beside its type."""

    type: Literal["text", "json_object", "json_schema"]
    content: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.content is None) != (self.type != "json_schema"):
            raise ValueError("a schema belongs to the type json_schema")
        return self


class TextOptions(Strict):
    """How answers are written."""

    form: TextFormat = Field(default=TextFormat(type="text", schema=None), alias="format")
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Strict):
    """The body, in the words of OpenAI's interface; the fields behind `stream` are vLLM's, `on_long` is ours."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    text: TextOptions = TextOptions()
    stream: bool | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    on_long: OnLong | None = None

    def chat(self, ignored: list[str]) -> ChatRequest:
        """The chat that it stands for."""
        turns = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [turn.message() for turn in turns]
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        has_logprobs = LOGPROBS in (self.include or ())
        form = self.text.form
        wanted: dict[str, Any] = {"type": form.type}
        if form.content is not None:
            wanted["json_schema"] = {"schema": form.content}
        chat = ChatRequest(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            logprobs=has_logprobs,
            top_logprobs=self.top_logprobs if has_logprobs else None,
            stream=self.stream,
            on_long=self.on_long,
            response_format=ResponseFormat.model_validate(wanted),
        )
        chat.ignore(ignored)
        return chat


def parse_responses(body: bytes) -> tuple[ResponsesRequest, ChatRequest]:
    """Reads a body. Costs time for large ones: not for the event loop.

    Raises:
        ApiError: 400 that names the field.
    """
    content = parse_json(body)
    if isinstance(content.get("input"), list):  # thoughts of earlier answers are not sent to the model
        content["input"] = [
            i for i in content["input"] if not (isinstance(i, dict) and i.get("type") == "reasoning")
        ]
        refuse_images(content["input"], "input")
    try:
        request = ResponsesRequest.model_validate(content)
        ignored = check_extra(request.model_extra or {}, ResponsesRequest.model_fields, UNSUPPORTED)
        wrong = set(request.include or ()) - {LOGPROBS, *NOTHING_TO_INCLUDE}
        if wrong:
            raise bad_request(f"include may hold {LOGPROBS!r}, not {min(wrong)[:100]!r}.", "include")
        if request.top_logprobs and LOGPROBS not in (request.include or ()):
            raise bad_request(f"top_logprobs need include: [{LOGPROBS!r}].", "top_logprobs")
        return request, request.chat(ignored)
    except ValidationError as error:
        raise as_api_error(error) from None
