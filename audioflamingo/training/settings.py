"""Parsed YAML or JSON -> dataclasses, with every key and type checked: the machinery behind `config.py`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from audioflamingo.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Builds a dataclass from a mapping; nested dataclasses, lists, dicts and literals are checked too.

    Args:
        cls: a dataclass; keys without default must be there.
        values: the parsed mapping.
        where: dotted name of this mapping, for messages.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the config'} must be a mapping of keys to values, got {values!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"{where or 'the config'} has no key {key!r}{hint}; it takes: {', '.join(fields)}."
            )
    hints = typing.get_type_hints(cls)
    arguments = {
        key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()
    }
    for name, f in fields.items():
        is_required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if is_required and name not in arguments:
            raise ConfigError(f"{where or 'the config'} needs the key {name!r}.")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (item for item in arguments if item is not type(None))
        return _convert(kind, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise ConfigError(f"{where} must be a list of {len(arguments)} values, got {value!r}.")
        return tuple(
            _convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r}.")
        return {
            _convert(arguments[0], k, where): _convert(arguments[1], v, f"{where}.{k}")
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else build(kind, value, where)
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be {names.get(kind, kind)}, got {value!r}.")
    return value


def override(values: dict[str, Any], assignment: str, parse: Any) -> None:
    """Applies `stages.0.max_steps=100` to parsed values in place.

    Args:
        values: the parsed config.
        assignment: dotted key, `=`, value; list items are named by their index.
        parse: reads the value (a YAML parser).

    Raises:
        ConfigError: no `=`, or a key on the way that is not there.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"an override looks like key=value or stages.0.max_steps=100, got {assignment!r}.")
    *parents, last = path.split(".")
    target: Any = values
    try:
        for name in parents:
            target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
        key = int(last) if isinstance(target, list) else last
        target[key] = parse(text)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the override {assignment!r} names a place that the config does not have."
        ) from error
