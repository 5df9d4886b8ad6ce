"""Options are said once: in the fields of their dataclasses, which check themselves and become flags."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from audioflamingo.cli.ask_command import AnswerOptions
from audioflamingo.cli.flags import flag_names, with_flags
from audioflamingo.cli.model_loading import ModelOptions
from audioflamingo.cli.serve_command import serve
from audioflamingo.cli.transcribe_command import transcribe
from audioflamingo.cli.transcribe_job import OutputOptions
from audioflamingo.corpus import ClusterOptions
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.errors import ArgumentError
from audioflamingo.evaluation import EvaluationOptions
from audioflamingo.fields import check_fields, clock_time, option, option_of, same_option
from audioflamingo.server.server_settings import ServerSettings
from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions

ALL = (
    AnswerOptions, ClusterOptions, EngineOptions, EvaluationOptions, ModelOptions, OutputOptions, ServerSettings,
    TranscriptionOptions, VadOptions,
)  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """Of all kinds."""

    whole: int = option(1, "A whole number.", at_least=1)
    share: float = option(0.5, "A share.", above=0, at_most=1.0)
    time_s: float = option(0.0, "A time.", at_least=0.0)
    open: int | None = option(None, "Left open.", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)


def test_what_is_allowed() -> None:
    assert Numbers(2, 1.0, 0, None) == Numbers(2, 1.0, 0.0)
    assert Numbers(open=3).open == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"whole": 0}, "whole must be a whole number of at least 1, got 0."),
        ({"whole": 1.5}, "whole must be a whole number of at least 1, got 1.5."),
        ({"whole": True}, "whole must be a whole number of at least 1, got True."),
        ({"whole": None}, "whole must be a whole number of at least 1, got None."),
        ({"open": 0}, "open must be a whole number of at least 1, got 0."),
        ({"share": 0.0}, "share must be above 0, got 0.0."),
        ({"share": 1.5}, "share must be at most 1, got 1.5."),
        ({"time_s": -1}, "time_s must be at least 0, got -1."),
        ({"time_s": "1"}, "time_s must be at least 0, got '1'."),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Numbers(**values)
    assert str(error.value) == message


@pytest.mark.parametrize("kind", ALL)
def test_every_field_says_what_it_is_for(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        about = option_of(field)
        assert about is None or about.help.endswith("."), field.name
        assert about is not None or field.default_factory is not dataclasses.MISSING, field.name


def test_a_field_of_another_dataclass_is_the_same() -> None:
    @dataclass
    class Others:
        whole: int = same_option(Numbers, "whole")

    assert (Others().whole, option_of(dataclasses.fields(Others)[0])) == (
        1,
        option_of(dataclasses.fields(Numbers)[0]),
    )


def test_flags_are_the_fields() -> None:
    flags = inspect.signature(transcribe).parameters
    assert flags["batch_size"].default == TranscriptionOptions.batch_size
    assert flags["max_window_s"].default == VadOptions.max_window_s
    assert "end_threshold" not in flags  # the threshold says it
    assert "vad" not in flags
    assert {*flag_names(TranscriptionOptions), *flag_names(ClusterOptions), "quiet", "debug"} < flags.keys()
    served = inspect.signature(serve).parameters
    assert {field.name for field in dataclasses.fields(ServerSettings)} < served.keys()
    assert served["max_rows"].default == EngineOptions.max_rows


def test_a_low_threshold_takes_the_end_along() -> None:
    assert VadOptions.from_flags(0.2).end_threshold == 0.2
    assert VadOptions.from_flags(0.9) == VadOptions(threshold=0.9)


@dataclass(frozen=True)
class Inner:
    """Options within others."""

    hosts: tuple[str, ...] = option((), "May be repeated.")
    use_cache: bool = option(True, "Remember.")
    hidden: int = option(7, "No flag.", is_flag=False)


@dataclass(frozen=True)
class Outer:
    """Options of a command."""

    number: float | None = option(None, "A number.", at_least=0.0, short="-n", envvar="TEST_NUMBER")
    is_new: bool = option(False, "New.")
    inner: Inner = dataclasses.field(default_factory=Inner)


def run_with_flags(*arguments: str, **options: Any) -> tuple[int, list[Any]]:
    """The exit code, and what a command with these options was called with."""
    calls: list[Any] = []

    @with_flags
    def command(name: str, *, outer: Outer) -> None:
        calls.append((name, outer))

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), **options).exit_code, calls


def test_flags_become_the_object_again() -> None:
    assert run_with_flags("x") == (0, [("x", Outer())])
    arguments = ("x", "-n", "2", "--host", "a", "--host", "b", "--no-cache", "--is-new")
    assert run_with_flags(*arguments) == (0, [("x", Outer(2.0, True, Inner(("a", "b"), use_cache=False)))])
    assert run_with_flags("x", env={"TEST_NUMBER": "3"}) == (0, [("x", Outer(3.0))])
    for wrong in (("--number", "-1"), ("--hidden", "1"), ("--no-is-new",), ("--inner", "1")):
        assert run_with_flags("x", *wrong) == (2, [])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90.5", 90.5),
        (".5", 0.5),
        ("2:30", 150),
        ("90:00", 5400),
        ("1:02:03.5", 3723.5),
        ("2m30s", 150),
        ("1h", 3600),
        ("1H2m3.5s", 3723.5),
        (" 30s ", 30),
    ],
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert clock_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "abc", "1:60", "1:60:00", "1:2:3:4", "-1", "5x", "inf", "nan", "1e3", "٣", ":30"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"a time must be seconds, or as in 1:02:03\.5 or 2m30s"):
        clock_time(text)
