"""Flags made of dataclasses: a command takes its options as whole objects, and every field of theirs is a flag.

    @with_flags
    def transcribe(paths: ..., options: TranscriptionOptions, model: ModelOptions) -> None: ...

The field is the only place where a flag's name, type, default, bounds and help stand (`audioflamingo.fields.option`).
A list is a flag that may be repeated, named in the singular. Parameters that are no such dataclass stay as typer
has them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from audioflamingo.cli.failures import DEBUG, QUIET
from audioflamingo.errors import ArgumentError
from audioflamingo.fields import Option, clock_time, option, option_of

_REMEMBERED = {
    "quiet": QUIET,
    "debug": DEBUG,
}  # flags that the report of a failure looks at, by its own names


@dataclasses.dataclass(frozen=True)
class QuietOptions:
    """For commands that say what they do."""

    quiet: bool = option(False, "Print results and errors only.", short="-q", group="Output")


@dataclasses.dataclass(frozen=True)
class ScreenOptions(QuietOptions):
    """For commands that can say more."""

    verbose: bool = option(False, "Say what is being done.", short="-v", group="Output")


@dataclasses.dataclass(frozen=True)
class _DebugOptions:
    """For every command."""

    debug: bool = option(False, "Show the traceback of an error.", group="Output")


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one flag for each field of the dataclasses that it takes, and `--debug`."""
    hints = get_type_hints(command, include_extras=True)
    kinds: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in kinds:
            parameters += _parameters(kinds[parameter.name])
        else:
            plain = parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            parameters.append(plain)
    parameters += _parameters(_DebugOptions)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        values.pop("debug")
        options = {name: _build(kind, values) for name, kind in kinds.items()}
        command(**values, **options)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def flag_names(kind: type) -> list[str]:
    """The names that the flags of a dataclass have as parameters of a command."""
    return [parameter.name for parameter in _parameters(kind)]


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line; by name, as typer may or may not bring its own click."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_without(ctx: typer.Context, kind: type, needed: str) -> None:
    """Refuses flags of a dataclass where what they belong to is not asked for.

    Raises:
        typer.BadParameter: one is given.
    """
    for name in flag_names(kind):
        if is_given(ctx, name):
            raise typer.BadParameter(f"it needs {needed}.", param_hint=f"--{name.replace('_', '-')}")


def _fields(kind: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Fields and their types: those that are flags, and those that hold further ones."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        about = option_of(field)
        if dataclasses.is_dataclass(hints[field.name]) or (about is not None and about.is_flag):
            yield field, hints[field.name]


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    for field, hint in _fields(kind):
        about = option_of(field)
        if about is None:
            yield from _parameters(hint)
            continue
        default = None if _is_list(hint) else field.default
        annotation = list[str] | None if _is_list(hint) else hint
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[annotation, _typer_option(field, hint, about)],
        )


def _typer_option(field: dataclasses.Field[Any], hint: Any, about: Option) -> Any:
    name = field.name.removesuffix("s") if _is_list(hint) else field.name
    flag = about.flag or f"--{name.replace('_', '-')}"
    if hint is bool and field.default:
        flag += f"/--no-{name.removeprefix('use_').replace('_', '-')}"
    return typer.Option(
        flag,
        *([about.short] if about.short else []),
        help=about.help,
        min=about.at_least,
        max=about.at_most,
        metavar="TIME" if about.is_time else about.metavar,
        parser=_seconds if about.is_time else None,
        envvar=about.envvar,
        callback=_remember(_REMEMBERED[name]) if name in _REMEMBERED else None,
        rich_help_panel=about.group,
    )


def _seconds(text: str) -> float:
    try:
        return clock_time(text)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _remember(key: str) -> Callable[..., bool]:
    def callback(ctx: typer.Context, value: bool) -> bool:
        if value:
            ctx.find_root().meta[key] = True
        return value

    return callback


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """The object whose flags are among `values`, which are taken out.

    A class that has to look at several flags together has a method `from_flags`.
    """
    chosen = {}
    for field, hint in _fields(kind):
        if option_of(field) is None:
            chosen[field.name] = _build(hint, values)
        else:
            value = values.pop(field.name)
            chosen[field.name] = tuple(value or ()) if _is_list(hint) else value
    return getattr(kind, "from_flags", kind)(**chosen)
