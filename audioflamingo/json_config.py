"""Base of the configurations: dataclasses that are read from JSON, check their values once, and lose nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from audioflamingo.errors import ConfigError


@dataclass
class JsonConfig:
    """A dataclass that maps to and from one JSON object and keeps the keys that it does not know."""

    model_type: ClassVar[str | None] = None
    accepted_model_types: ClassVar[tuple[str | None, ...]] = ()
    older_names: ClassVar[dict[str, str]] = {}

    extra: dict[str, Any] = field(default_factory=dict, repr=False, kw_only=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the configuration from a parsed JSON object.

        Raises:
            ConfigError: `values` is not an object, is of another model type, or holds impossible values.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__} needs a JSON object, got {type(values).__name__}.")
        values = cls._translate(dict(values))
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        arguments = {name: value for name, value in values.items() if name in known}
        config = cls(**arguments)
        config.extra = {name: value for name, value in values.items() if name not in known}
        return config

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Checks the model type and brings older key names to today's. Changes and returns `values`."""
        found = values.pop("model_type", cls.model_type)
        if cls.model_type is not None and found not in (cls.model_type, *cls.accepted_model_types):
            raise ConfigError(f"model_type {found!r} is not {cls.model_type!r}: {cls._instead_of(found)}")
        for older, name in cls.older_names.items():
            if older in values:
                value = values.pop(older)
                if values.setdefault(name, value) != value:
                    raise ConfigError(
                        f"{older} = {value!r} contradicts {name} = {values[name]!r}; remove one of them."
                    )
        return values

    @classmethod
    def _instead_of(cls, model_type: Any) -> str:
        """What to say about another model type."""
        return "another model's settings would give plausible nonsense."

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object: the fields, the model type and the kept unknown keys."""
        values: dict[str, Any] = {} if self.model_type is None else {"model_type": self.model_type}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name != "extra":
                values[f.name] = value.to_dict() if isinstance(value, JsonConfig) else value
        return {**self.extra, **values}

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field or a kept unknown key, as `dict.get` does (tools such as peft read configurations so)."""
        return self.to_dict().get(name, default)


def require_positive(config: JsonConfig, *names: str) -> None:
    """Raises ConfigError unless these fields are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{type(config).__name__}.{name} must be a whole number of at least 1, got {value!r}."
            )


def require_probability(config: JsonConfig, *names: str) -> None:
    """Raises ConfigError unless these fields lie in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{type(config).__name__}.{name} must lie in [0, 1), got {value!r}.")


def require_equal(config: JsonConfig, name: str, only: Any) -> None:
    """Raises ConfigError unless a field has the one value that is implemented."""
    value = getattr(config, name)
    if value != only:
        raise ConfigError(f"{type(config).__name__}.{name} = {value!r} is not implemented; only {only!r} is.")
