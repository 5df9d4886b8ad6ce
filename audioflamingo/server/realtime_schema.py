"""What a live session may be told: its configuration, in the words of OpenAI's two interfaces, checked.

The newer one (`session.update`) nests what the older one (`transcription_session.update`) has side by side.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from audioflamingo.audio.live_audio import Encoding, LiveAudio
from audioflamingo.server.error_replies import ApiError, bad_request
from audioflamingo.server.transcription_form import LANGUAGE, MAX_HINT_CHARACTERS
from audioflamingo.transcription.transcription_options import VadOptions

Content = dict[str, Any]

RATE = 24000  # Hz of pcm16, unless the session says
G711_RATE = 8000
ENCODINGS: dict[str, Encoding] = {"audio/pcm": "pcm16", "audio/pcmu": "ulaw", "audio/pcma": "alaw"}
OLD_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
# Fields of the older interface that have another place in the newer one.
OLD_NAMES = {
    "input_audio_transcription": "transcription",
    "turn_detection": "turn_detection",
    "input_audio_noise_reduction": "noise_reduction",
}
OURS_TO_SAY = ("id", "object", "expires_at", "client_secret", "modalities")  # a client may send them back
DRAFT_EVERY_S = {"minimal": 0.5, "low": 1.0, "medium": 2.0, "high": 4.0, "xhigh": None}


class Known(BaseModel):
    """Types are taken at their word, and there are no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Format(Known):
    """How samples come: mono; 16-bit little-endian, or G.711. Other rates of pcm than 24000 Hz are our extension."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Annotated[int, Field(ge=8000, le=48000)] | None = None

    @property
    def hz(self) -> int:
        """Samples a second."""
        return (self.rate or RATE) if self.type == "audio/pcm" else G711_RATE

    def new_audio(self) -> LiveAudio:
        """A stream of this form."""
        return LiveAudio(ENCODINGS[self.type], self.hz)


class ServerVad(Known):
    """When somebody speaks. The last two fields are about spoken answers, of which there are none."""

    type: Literal["server_vad"]
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=5000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=0, le=10000)] = 500
    idle_timeout_ms: None = None
    create_response: bool | None = None
    interrupt_response: bool | None = None

    @property
    def options(self) -> VadOptions:
        """The same for the library."""
        return VadOptions.from_flags(
            self.threshold,
            pad_ms=float(self.prefix_padding_ms),
            min_silence_ms=float(self.silence_duration_ms),
            max_pause_ms=0.0,
        )


class LiveTranscription(Known):
    """What is done with speech. `delay`: how often growing speech is heard; at xhigh only when it has ended."""

    model: str | None = None
    language: Annotated[str, Field(max_length=40, pattern=f"^{LANGUAGE.pattern}$")] | None = None
    prompt: Annotated[str, Field(max_length=MAX_HINT_CHARACTERS)] | None = None
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] = "low"

    @property
    def draft_every_s(self) -> float | None:
        """Seconds of new speech after which it is heard again; None: never."""
        return DRAFT_EVERY_S[self.delay]


class LiveInput(Known):
    """The audio that comes in. There is no noise reduction: the model hears what is sent."""

    format: Format = Format()
    noise_reduction: Any = None
    transcription: LiveTranscription = LiveTranscription()
    turn_detection: ServerVad | None = ServerVad(type="server_vad")


class LiveSides(Known):
    """There is one side: nothing is spoken back."""

    input: LiveInput = LiveInput()


class LiveConfig(Known):
    """The configuration of a live session."""

    type: Literal["transcription"] = "transcription"
    audio: LiveSides = LiveSides()
    include: Annotated[list[str], Field(max_length=0)] | None = None

    @property
    def input(self) -> LiveInput:
        """The audio that comes in."""
        return self.audio.input

    def updated(self, changes: Content) -> LiveConfig:
        """The configuration with what a client wants to change; what it does not name stays.

        Raises:
            ApiError: 400 that names the field.
        """
        present = self.model_dump(exclude_unset=False)
        wanted = {name: value for name, value in changes.items() if name not in OURS_TO_SAY}
        try:
            config = LiveConfig.model_validate(_merged(present, wanted))
        except ValidationError as error:
            raise _as_api_error(error) from None
        config.input.noise_reduction = None  # `session.updated` says what holds
        return config

    def shown(self, session: Content, model: str) -> Content:
        """What clients of the newer interface see."""
        return {**session, "type": self.type, "audio": {"input": self._shown(model)}, "include": self.include}

    def shown_flat(self, session: Content, model: str) -> Content:
        """What clients of the older interface see."""
        new = self._shown(model)
        old = {there: new[here] for there, here in OLD_NAMES.items()}
        (name,) = (there for there, here in OLD_FORMATS.items() if here == self.input.format.type)
        return {**session, "input_audio_format": name, **old, "include": self.include}

    def _shown(self, model: str) -> Content:
        content = self.input.model_dump()
        content["format"] = {"type": self.input.format.type, "rate": self.input.format.hz}
        content["transcription"]["model"] = self.input.transcription.model or model
        return content


def from_flat(session: Content) -> Content:
    """The words of the newer interface for those of the older one.

    Raises:
        ApiError: 400 that names the field.
    """
    new: Content = {}
    rest: Content = {}
    for name, value in session.items():
        if name == "input_audio_format":
            if not isinstance(value, str) or value not in OLD_FORMATS:
                allowed = ", ".join(OLD_FORMATS)
                raise bad_request(
                    f"session.{name} must be one of {allowed}.", f"session.{name}", "invalid_value"
                )
            new["format"] = {"type": OLD_FORMATS[value]}
        elif name in OLD_NAMES:
            new[OLD_NAMES[name]] = value
        else:
            rest[name] = value
    return {**rest, **({"audio": {"input": new}} if new else {})}


def _merged(present: Any, changes: Any) -> Any:
    """Objects field by field, except formats, whose fields belong together; the rest is replaced."""
    if not (isinstance(present, dict) and isinstance(changes, dict)):
        return changes
    merged = dict(present)
    for name, value in changes.items():
        merged[name] = value if name == "format" else _merged(present.get(name), value)
    return merged


def _as_api_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, ("session", *first["loc"])))[:200]
    if first["type"] == "extra_forbidden":
        return bad_request(f"there is no field {place!r}.", place, "unknown_parameter")
    if first["loc"] == ("type",):
        return bad_request("only sessions of the type 'transcription' are served.", place, "invalid_value")
    if first["loc"] == ("include",):
        return bad_request("include is not supported; leave it out.", place, "unsupported_parameter")
    return bad_request(f"{place}: {first['msg']}.", place, "invalid_value")
