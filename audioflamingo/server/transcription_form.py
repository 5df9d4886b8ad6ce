"""The form of a transcription request, read within limits and checked."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from audioflamingo.audio.reading import Reading
from audioflamingo.errors import ArgumentError
from audioflamingo.fields import clock_time
from audioflamingo.server.error_replies import bad_request
from audioflamingo.transcription.transcription_options import TranscriptionOptions

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
READING = tuple(field.name for field in dataclasses.fields(Reading))  # track, channel, allow_damaged
FIELDS = (
    *("file", "model", "language", "prompt", "instruction", "response_format", "temperature", "stream"),
    *("start", "end"),
    *READING,
)
HARMLESS = ("user", "metadata")  # fields of known clients that change nothing
NEUTRAL = {
    "vad_filter": ("true", "True"),
    "word_timestamps": ("false", "False"),
    "diarize": ("false", "False"),
}
LISTS = ("timestamp_granularities", "include", "chunking_strategy")
LANGUAGE = re.compile(r"[A-Za-z]+([-_][A-Za-z]+)*")
MAX_HINT_CHARACTERS = 4000
MAX_FIELDS = 64


@dataclasses.dataclass(frozen=True)
class TranscriptionRequest:
    """The form, checked.

    Attributes:
        model: that the client wants.
        task: "transcribe" or "translate".
        data: the audio file.
        language: what the client says is spoken; only reported back, the model hears for itself.
        response_format: one of `FORMATS`.
        temperature: 0 takes the most likely tokens.
        is_streamed: send segments as they come.
        options: how to transcribe.
        ignored: fields that were left aside, because they change nothing.
    """

    model: str
    task: str
    data: bytes
    language: str | None
    response_format: str
    temperature: float
    is_streamed: bool
    options: TranscriptionOptions
    ignored: tuple[str, ...] = ()

    @property
    def spoken(self) -> str | None:
        """The language of the transcript, where it is known."""
        return "english" if self.task == "translate" else self.language


async def read_form(request: Request, max_bytes: int) -> FormData:
    """Reads a multipart form. Files stay in memory: nothing is written to disk.

    Raises:
        ApiError: 400 if it is none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise bad_request("send the audio as multipart/form-data, with a part named 'file'.")
    parser = WholeFormParser(
        request.headers,
        request.stream(),
        max_files=MAX_FIELDS,
        max_fields=MAX_FIELDS,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(f"the form cannot be read: {error.message}") from None
    except (LookupError, ValueError) as error:  # an unknown charset, bytes that are not in it
        raise bad_request(f"the form cannot be read: {error!r}") from None
    if not parser.is_whole:
        await form.close()
        raise bad_request("the form ends in the middle of a part; send all of it.")
    return form


class WholeFormParser(MultiPartParser):
    """Knows whether it saw the end of the form; Starlette's takes half a file for a whole one."""

    is_whole = False

    def on_part_end(self) -> None:
        """Takes the part 'file' for a file where it has no file name but bytes that are no text."""
        part = self._current_part
        if part.file is None and part.field_name == "file" and _is_binary(part.data):
            data = io.BytesIO(part.data)
            self.items.append((part.field_name, UploadFile(data, size=len(part.data), filename="")))
        else:
            super().on_part_end()

    def on_end(self) -> None:
        """Called at the last boundary."""
        self.is_whole = True


def _is_binary(data: bytearray) -> bool:
    """Whether bytes are no text: then it was a file that was sent, not its name."""
    try:
        return "\0" in data.decode()
    except UnicodeDecodeError:
        return True


async def parse_form(form: FormData, task: str, default_instruction: str) -> TranscriptionRequest:
    """Checks a form.

    Args:
        form: as it was read.
        task: what is done with it.
        default_instruction: what the model is asked where the form does not say.

    Raises:
        ApiError: 400 that names the field.
    """
    model = _text(form, "model")
    if model is None:
        raise bad_request("model is missing.", "model")
    ignored = {name for name in form if name in HARMLESS or form.get(name) in NEUTRAL.get(name, ())}
    for name in set(form) - ignored:
        if name not in FIELDS and name.partition("[")[0] not in LISTS:
            raise bad_request(f"there is no field {name[:100]!r}.", name[:100], "unknown_parameter")
    response_format = _text(form, "response_format") or "json"
    if response_format not in FORMATS:
        raise bad_request(f"response_format must be one of {', '.join(FORMATS)}.", "response_format")
    granularities = _check_lists(form, response_format)
    is_streamed = _flag(form, "stream")
    if is_streamed and response_format not in ("json", "text"):
        raise bad_request(f"stream gives text only; leave out response_format={response_format}.", "stream")
    start_s, end_s = _part(form)
    return TranscriptionRequest(
        model=model,
        task=task,
        data=await _file(form),
        language=language_of(form),
        response_format=response_format,
        temperature=_temperature(form),
        is_streamed=is_streamed,
        options=TranscriptionOptions(
            prompt=_instruction(form, task, default_instruction),
            word_timestamps="word" in granularities,
            start_s=start_s,
            end_s=end_s,
            **dataclasses.asdict(_reading(form)),
        ),
        ignored=tuple(sorted(ignored)),
    )


def _part(form: FormData) -> tuple[float | None, float | None]:
    """Which part of the file, in seconds."""
    start_s, end_s = _time(form, "start"), _time(form, "end")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise bad_request("end must be later than start.", "end")
    return start_s, end_s


def _time(form: FormData, name: str) -> float | None:
    text = _text(form, name)
    try:
        return None if text is None else clock_time(text)
    except ArgumentError as error:
        raise bad_request(f"{name}: {error}", name) from None


def _reading(form: FormData) -> Reading:
    """Which track and channels of the file."""
    track, channel = _text(form, "track"), _text(form, "channel") or Reading.channel
    if track is not None and not (track.isdecimal() and len(track) < 6 and int(track)):
        raise bad_request("track must be the number of an audio track, from 1 on.", "track")
    allow_damaged = _flag(form, "allow_damaged")
    try:
        return Reading(None if track is None else int(track), channel, allow_damaged)  # type: ignore[arg-type]
    except ArgumentError as error:
        raise bad_request(str(error), "channel") from None


def language_of(form: FormData) -> str | None:
    """What the client says is spoken.

    Raises:
        ApiError: 400 if it is no language.
    """
    language = _text(form, "language")
    if language is not None and not (len(language) <= 40 and LANGUAGE.fullmatch(language)):
        raise bad_request("language must be a code such as 'en'.", "language")
    return language


def _instruction(form: FormData, task: str, default: str) -> str | None:
    """What the model is asked: `instruction` or its own prompt, with the hint of `prompt` behind it."""
    instruction, hint = _text(form, "instruction"), _text(form, "prompt")
    for name, text in (("instruction", instruction), ("prompt", hint)):
        if text is not None and len(text) > MAX_HINT_CHARACTERS:
            raise bad_request(f"{name} may have {MAX_HINT_CHARACTERS} characters.", name)
    if hint is None:
        return default if instruction is None and task == "translate" else instruction
    return with_hint(instruction or default, hint)


def with_hint(instruction: str, hint: str | None) -> str:
    """What the model is asked, with the context that a client gives."""
    return instruction if hint is None else f"{instruction} Context: {hint}"


def _text(form: FormData, name: str) -> str | None:
    """A field's text; None if it is absent or empty."""
    values = form.getlist(name)
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        raise bad_request(f"{name} must be given once, as text.", name)
    return str(values[0]) if values and values[0] else None


def _flag(form: FormData, name: str) -> bool:
    text = (_text(form, name) or "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise bad_request(f"{name} must be true or false.", name)
    return text in ("true", "1")


def _temperature(form: FormData) -> float:
    text = _text(form, "temperature") or "0"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise bad_request("temperature must be a number from 0 to 1.", "temperature")
    return value


async def _file(form: FormData) -> bytes:
    """The audio. Its name is not looked at."""
    files = form.getlist("file")
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        raise bad_request("there must be one part 'file' with the audio.", "file")
    data = await files[0].read()
    if not data:
        raise bad_request("the file is empty.", "file", "invalid_audio")
    return data


def _check_lists(form: FormData, response_format: str) -> list[str]:
    """Checks the fields that are lists; returns which times are wanted."""
    values = {  # some clients number them: `timestamp_granularities[0]`
        name: [str(value) for key, value in form.multi_items() if key.partition("[")[0] == name]
        for name in LISTS
    }
    wanted = values["timestamp_granularities"]
    if wanted and response_format != "verbose_json":
        raise bad_request(
            "timestamp_granularities need response_format=verbose_json.", "timestamp_granularities"
        )
    if any(value not in ("segment", "word") for value in wanted):
        raise bad_request(
            "timestamp_granularities[] may be 'segment' or 'word'; for both, send the field twice.",
            "timestamp_granularities",
        )
    if values["include"]:
        raise bad_request("include is not supported; leave it out.", "include", "unsupported_parameter")
    _check_chunking(form)
    return wanted


def _check_chunking(form: FormData) -> None:
    """Recordings are always cut where nobody speaks: an order to do so is met, its own numbers for that are not.

    Clients send the object as fields of their own (`chunking_strategy[type]`) or as JSON.
    """
    name = "chunking_strategy"
    asked: dict[str, Any] = {}
    for key, value in form.multi_items():
        if key.partition("[")[0] == name:
            text = str(value)
            asked |= _json_object(text) if text.startswith("{") else {key.removesuffix("]"): text}
    kinds = {name: "auto", f"{name}[type": "server_vad", "type": "server_vad"}
    if any(kinds.get(key) != value for key, value in asked.items()):
        raise bad_request(
            "chunking_strategy may be 'auto' or of the type 'server_vad' without more: thresholds are the server's.",
            name,
            "unsupported_parameter",
        )


def _json_object(text: str) -> dict[str, Any]:
    """The object that a text holds; one entry that nobody asked for where it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {text: text}
    return value if isinstance(value, dict) else {text: text}
