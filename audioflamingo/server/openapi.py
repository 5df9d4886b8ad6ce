"""The interface as an OpenAPI 3.1 document, made of what the routes check requests with.

`GET /openapi.json` serves it, and the documentation is built from it. https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from audioflamingo import __version__
from audioflamingo.audio.reading import CHANNELS
from audioflamingo.server.chat_schema import ChatRequest
from audioflamingo.server.responses_schema import ResponsesRequest
from audioflamingo.server.transcription_form import FORMATS, MAX_HINT_CHARACTERS

Schema = dict[str, Any]
JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
FORM_DATA = "multipart/form-data"
BODIES = (ChatRequest, ResponsesRequest)
ERRORS = {
    "400": "The request can never succeed as it is; `param` names the field.",
    "401": "The server wants a key.",
    "403": "Pages of that host may not use the server.",
    "404": "There is no such model.",
    "413": "The request is larger than the server takes.",
    "426": "This is a websocket; connect with ws:// or wss://.",
    "429": "The server is full; send the request again after `Retry-After` seconds.",
    "503": "The server is shutting down.",
    "504": "There was no complete answer in time.",
}


def openapi() -> Schema:
    """The whole document."""
    _, definitions = models_json_schema(
        [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "audioflamingo",
            "version": __version__,
            "description": "Audio Flamingo 3 behind OpenAI's interface.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": PATHS,
        "security": [{}, {"key": []}],
        "components": {
            "schemas": {**definitions["$defs"], **SCHEMAS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _object(required: Schema, **optional: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _text(about: str, **more: Any) -> Schema:
    return {"type": "string", "description": about, **more}


def _flag(about: str) -> Schema:
    return {"type": "boolean", "default": False, "description": about}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_STRING, _NUMBER, _COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
_MAYBE_STRING, _MAYBE_NUMBER = {"type": ["string", "null"]}, {"type": ["number", "null"]}

# The form's fields; a test compares their names with those that the route takes.
FORM: Schema = {
    "file": _text("The audio, in any common format.", contentMediaType="application/octet-stream"),
    "model": _text("Name of the model, or of an adapter."),
    "language": _text("What is spoken, such as `en`: only reported back, the model hears for itself."),
    "prompt": _text("Context, put behind the instruction.", maxLength=MAX_HINT_CHARACTERS),
    "instruction": _text(
        "What the model is asked in place of its usual words.", maxLength=MAX_HINT_CHARACTERS
    ),
    "response_format": {"enum": list(FORMATS), "default": "json"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
    "stream": _flag("Send the text segment by segment, as events; for json and text."),
    "start": _text("Begin here: seconds, or as in 1:02:03.5 or 2m30s; our extension. Times stay the file's."),
    "end": _text("End here, likewise."),
    "track": {
        "type": "integer",
        "minimum": 1,
        "description": "Which audio track; by default the file's own.",
    },
    "channel": {"enum": list(CHANNELS), "default": "mix", "description": "`each` is a transcript a channel."},
    "allow_damaged": _flag("Transcribe what is left of a damaged file."),
    "timestamp_granularities": {**_list({"enum": ["segment", "word"]}), "description": "For verbose_json."},
    "chunking_strategy": {
        "enum": ["auto", {"type": "server_vad"}, '{"type": "server_vad"}'],
        "description": "Recordings are always cut at silences.",
    },
    "include": {"type": "array", "maxItems": 0, "description": "Nothing can be included."},
}

# Replies.
SCHEMAS: Schema = {
    "Error": _object(
        {
            "error": _object(
                {"message": _STRING, "type": _STRING, "param": _MAYBE_STRING, "code": _MAYBE_STRING}
            )
        }
    ),
    "TranscriptionForm": _object(
        {name: FORM[name] for name in ("file", "model")},
        **{name: field for name, field in FORM.items() if name not in ("file", "model")},
    ),
    "Transcription": _object({"text": _STRING, "usage": {"type": "object"}}),
    "Segment": _object(
        {
            "id": _COUNT,
            "start": _NUMBER,
            "end": _NUMBER,
            "text": _STRING,
            "tokens": _list(_COUNT),
            "avg_logprob": _MAYBE_NUMBER,
            "compression_ratio": _NUMBER,
            "no_speech_prob": _MAYBE_NUMBER,
        },
        channel=_STRING,
    ),
    "VerboseTranscription": _object(
        {"duration": _NUMBER, "language": _STRING, "text": _STRING, "segments": _list(_ref("Segment"))}
    ),
    "Usage": _object(
        {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
        prompt_tokens_details=_object({"audio_tokens": _COUNT, "cached_tokens": _COUNT}),
    ),
    "Answer": _object(
        {"role": {"const": "assistant"}, "content": _STRING},
        reasoning_content=_text("What a thinking model wrote before its answer."),
    ),
    "Choice": _object(
        {
            "index": _COUNT,
            "message": _ref("Answer"),
            "finish_reason": {"enum": ["stop", "length"]},
            "logprobs": {"type": ["object", "null"]},
        }
    ),
    "Completion": _object(
        {
            "id": _STRING,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _STRING,
            "choices": _list(_ref("Choice")),
            "usage": _ref("Usage"),
        }
    ),
    "Item": _object(
        {
            "id": _STRING,
            "type": {"enum": ["message", "reasoning"]},
            "status": _STRING,
            "content": _list(_object({"type": {"enum": ["output_text", "reasoning_text"]}, "text": _STRING})),
        }
    ),
    "Response": _object(
        {
            "id": _STRING,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "model": _STRING,
            "status": {"enum": ["completed", "incomplete"]},
            "output": _list(_ref("Item")),
        }
    ),
    "Model": _object(
        {"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING},
        max_model_len={**_COUNT, "description": "Tokens of a prompt and its answer, together."},
        parent=_text("Of an adapter: the model that it changes."),
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Health": _object({"status": {"enum": ["ok", "unavailable"]}}),
}


def _reply(about: str, **media: Schema) -> Schema:
    kinds = {"json": JSON, "text": TEXT, "events": EVENTS}
    return {"description": about, "content": {kinds[name]: {"schema": media[name]} for name in media}}


def _get(summary: str, reply: Schema, *errors: str, **more: Any) -> Schema:
    status = "200" if "content" in reply else "101"
    return {"get": {"summary": summary, **more, "responses": {status: reply, **_errors(*errors)}}}


def _post(summary: str, media: str, body: str, reply: Schema) -> Schema:
    content = {media: {"schema": _ref(body)}}
    request = {"required": True, "content": content}
    responses = {"200": reply, **_errors(*(code for code in ERRORS if code not in ("403", "426")))}
    return {"post": {"summary": summary, "requestBody": request, "responses": responses}}


def _errors(*codes: str) -> Schema:
    return {code: _reply(ERRORS[code], json=_ref("Error")) for code in codes}


_EVENTS = _text("With `stream`: server-sent events, and `[DONE]` at the end.")
_INTENT = {"name": "intent", "in": "query", "schema": {"const": "transcription"}}
_MODEL = {"name": "model", "in": "query", "schema": _STRING}
_NAME = {"name": "name", "in": "path", "required": True, "schema": _STRING}

_TRANSCRIPT = _reply(
    "The transcript; the header `X-No-Speech` says that nobody speaks.",
    json={"anyOf": [_ref("Transcription"), _ref("VerboseTranscription")]},
    text=_text("For text, srt and vtt."),
    events=_EVENTS,
)

PATHS: Schema = {
    "/v1/chat/completions": _post(
        "Answers about audio and text.",
        JSON,
        "ChatRequest",
        _reply("The answers.", json=_ref("Completion"), events=_EVENTS),
    ),
    "/v1/responses": _post(
        "The same in the words of OpenAI's newer interface; nothing is stored.",
        JSON,
        "ResponsesRequest",
        _reply("The answer.", json=_ref("Response"), events=_EVENTS),
    ),
    "/v1/audio/transcriptions": _post(
        "Transcribes a recording of any length.", FORM_DATA, "TranscriptionForm", _TRANSCRIPT
    ),
    "/v1/audio/translations": _post(
        "Transcribes it in English, whatever is spoken.", FORM_DATA, "TranscriptionForm", _TRANSCRIPT
    ),
    "/v1/realtime": _get(
        "A websocket for speech that is transcribed while it is spoken: OpenAI's transcription sessions.",
        {"description": "The socket is open. Events go both ways as JSON text; see the page on live speech."},
        *("401", "403", "404", "426", "429", "503"),
        parameters=[_INTENT, _MODEL],
    ),
    "/v1/models": _get("The model, and its adapters.", _reply("All of them.", json=_ref("Models")), "401"),
    "/v1/models/{name}": _get(
        "One of them.", _reply("What it is.", json=_ref("Model")), "401", "404", parameters=[_NAME]
    ),
    "/health": _get("Whether requests have a chance.", _reply("They have.", json=_ref("Health"))),
    "/metrics": _get("Counters and times, for Prometheus.", _reply("Its text format.", text=_STRING), "401"),
    "/openapi.json": _get("This document.", _reply("OpenAPI 3.1.", json={"type": "object"})),
}
