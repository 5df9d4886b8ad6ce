"""Fields of option dataclasses that say what they are for and what they may be: once, for every door.

The dataclass checks itself with `check_fields`; the command line makes its flags of the same fields (`cli.flags`).
Imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from audioflamingo.errors import ArgumentError

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What is said about a field.

    Attributes:
        help: what it is for, in a sentence.
        at_least, at_most: smallest and largest value.
        above: a value that it must be larger than.
        is_flag: whether the command line has a flag for it.
        group: heading of the flag in the help.
        short: a second, short name of the flag.
        flag: its first name, where that is not the field's.
        metavar: stands for the value in the help.
        envvar: environment variable that the flag's value may come from.
        is_time: whether the flag takes what `clock_time` does.
    """

    help: str
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    is_flag: bool = True
    group: str | None = None
    short: str | None = None
    flag: str | None = None
    metavar: str | None = None
    envvar: str | None = None
    is_time: bool = False


def option(default: Any, help: str, **details: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where nobody says anything.
        help: what it is for, in a sentence.
        **details: see `Option`.
    """
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **details)})


def same_option(options: type, name: str) -> Any:
    """A field like one of another dataclass: its default and what is said about it."""
    (field,) = (field for field in dataclasses.fields(options) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def option_of(field: dataclasses.Field[Any]) -> Option | None:
    """What `option` said about a field; None for any other field."""
    return field.metadata.get(_KEY)


def check_fields(options: Any) -> None:
    """Checks the ranges that the fields of `options` state; None passes where the type allows it.

    Raises:
        ArgumentError: a value is not allowed.
    """
    for field in dataclasses.fields(options):
        about, value = option_of(field), getattr(options, field.name)
        if about is None or (value is None and "None" in str(field.type)):
            continue
        if about.at_least is not None:
            is_whole = isinstance(about.at_least, int)
            is_number = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
            kind = "a whole number of at least" if is_whole else "at least"
            check_value(
                is_number and value >= about.at_least, field.name, value, f"{kind} {about.at_least:g}"
            )
        if about.at_most is not None:
            check_value(value <= about.at_most, field.name, value, f"at most {about.at_most:g}")
        if about.above is not None:
            check_value(value > about.above, field.name, value, f"above {about.above:g}")


_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:\.\d*)?)")
_UNITS = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d*)?)s)?", re.IGNORECASE)


def clock_time(text: str) -> float:
    """Seconds of a time as people write it: `90`, `90.5`, `2:30`, `1:02:03.5`, `2m30s`, `1h`.

    Raises:
        ArgumentError: it is none.
    """
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII):
        return float(text)
    found = text.isascii() and text and (_CLOCK.fullmatch(text) or _UNITS.fullmatch(text))
    h, m, s = (float(part or 0) for part in found.groups()) if found else (0, 0, math.inf)
    is_clock = ":" not in text or (s < 60 and (text.count(":") == 1 or m < 60))
    allowed = "seconds, or as in 1:02:03.5 or 2m30s"
    check_value(math.isfinite(s) and is_clock, "a time", text[:100], allowed)
    return 3600 * h + 60 * m + s


def check_value(is_allowed: bool, name: str, value: object, allowed: str) -> None:
    """Raises ArgumentError that names the argument, its value and what is allowed, unless it is allowed."""
    if not is_allowed:
        raise ArgumentError(f"{name} must be {allowed}, got {value!r}.")
