"""What the processor can be told about padding and audio, in groups (`text_kwargs`, ...) or flat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from audioflamingo.errors import ArgumentError, unknown_arguments

_PADDINGS = (True, False, "longest", "max_length", "do_not_pad")


@dataclass(frozen=True)
class TextOptions:
    """How prompts become a batch.

    Attributes:
        padding: True or "longest": to the longest row. "max_length": to `max_length`. False or "do_not_pad":
            rows must be of equal length.
        padding_side: "left" for generation, "right" if you prefer it for training; the model takes both.
        max_length: the most tokens that a row may have. A longer row is an error, never cut.
        pad_to_multiple_of: rounds the padded length up.
        truncation: False. It exists to say so: a cut prompt loses audio positions or the question.
        return_tensors: "pt".
    """

    padding: bool | str = True
    padding_side: str = "left"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    truncation: bool = False
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if not isinstance(self.padding, bool | str) or self.padding not in _PADDINGS:
            raise ArgumentError(
                f"padding={self.padding!r}: it must be True, False, 'longest' or 'max_length'."
            )
        if self.padding_side not in ("left", "right"):
            raise ArgumentError(f"padding_side={self.padding_side!r}: it must be 'left' or 'right'.")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}={value!r}: it must be a whole number from 1 on, or None.")
        if self.padding == "max_length" and self.max_length is None:
            raise ArgumentError("padding='max_length' needs max_length.")
        if self.truncation not in (False, None, "do_not_truncate"):
            raise ArgumentError(
                f"truncation={self.truncation!r}: prompts are never cut, which would lose audio or text. "
                "Shorten the conversation, or cut the audio."
            )
        if self.return_tensors != "pt":
            raise ArgumentError(
                f"return_tensors={self.return_tensors!r}: only 'pt' (torch tensors) is supported."
            )


@dataclass(frozen=True)
class AudioOptions:
    """How clips become features.

    Attributes:
        sampling_rate: Hz of arrays and tensors that state none themselves; None means 16000. Files state
            their own.
        on_long: "truncate" keeps the start of a clip that is too long, with a warning; "error" refuses it.
    """

    sampling_rate: float | None = None
    on_long: str = "truncate"

    def __post_init__(self) -> None:
        if self.on_long not in ("truncate", "error"):
            raise ArgumentError(f"on_long={self.on_long!r}: it must be 'truncate' or 'error'.")


def collect_options(
    where: str,
    flat: Mapping[str, Any],
    text_kwargs: Mapping[str, Any] | None,
    audio_kwargs: Mapping[str, Any] | None,
    other_arguments: Iterable[str] = (),
) -> tuple[TextOptions, AudioOptions]:
    """Sorts options into their groups.

    Args:
        where: what was called, for messages.
        flat: options given as keywords of the call.
        text_kwargs: options given as a group.
        audio_kwargs: likewise.
        other_arguments: further keywords of the call, to propose where one is misspelt.

    Raises:
        ArgumentError: an unknown option, one given twice, or a value that is not allowed.
    """
    groups: dict[str, dict[str, Any]] = {}
    names = {"text_kwargs": _names(TextOptions), "audio_kwargs": _names(AudioOptions)}
    for group, given in (("text_kwargs", text_kwargs), ("audio_kwargs", audio_kwargs)):
        if given is not None and not isinstance(given, Mapping):
            raise ArgumentError(f"{where}: {group} must be a dict, got {type(given).__name__}.")
        groups[group] = dict(given or {})
        if unknown := [str(name) for name in groups[group] if name not in names[group]]:
            raise unknown_arguments(f"{where}, {group}", unknown, names[group])
    unknown = []
    for name, value in flat.items():
        owner = next((group for group, known in names.items() if name in known), None)
        if owner is None:
            unknown.append(name)
        elif name in groups[owner]:
            raise ArgumentError(f"{where}: {name} is given twice, as a keyword and in {owner}.")
        else:
            groups[owner][name] = value
    if unknown:
        allowed = (*other_arguments, *names, *(name for known in names.values() for name in known))
        raise unknown_arguments(where, unknown, allowed)
    return TextOptions(**groups["text_kwargs"]), AudioOptions(**groups["audio_kwargs"])


def _names(options: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(options))
