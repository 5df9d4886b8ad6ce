"""What the modules return: dataclasses whose fields are also reachable by key and by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from audioflamingo.network.kv import KVCache


class ModelOutput:
    """Base of the outputs: `output.name`, `output["name"]`, `output[i]` (i counts the fields that are not None)."""

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"{key!r}; this output holds: {', '.join(self.keys())}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """Values of the fields that are not None."""
        return tuple(getattr(self, name) for name in self.keys())


@dataclass
class EncoderOutput(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: pooled, normalised, `(W, 750, D)`; rows past a window's audio tokens are 0.
        audio_tokens: the rows that are audio tokens, of all windows in order, `(A, D)`.
        num_tokens: how many of them each window has.
    """

    last_hidden_state: Tensor
    audio_tokens: Tensor
    num_tokens: list[int]


@dataclass
class AudioFeaturesOutput(ModelOutput):
    """Output of `get_audio_features`.

    Attributes:
        last_hidden_state: the encoder's, `(W, 750, D_audio)`.
        pooler_output: projected audio tokens of all windows in order, `(A, D_text)`.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor


@dataclass
class LanguageModelOutput(ModelOutput):
    """Output of the language model without its head.

    Attributes:
        last_hidden_state: `(B, S, D)`; rows of padding are 0.
        past_key_values: the cache, when one was used.
        hidden_states: embeddings, then the output of each layer (the last one normalised), each `(B, S, D)`.
        attentions: weights of each layer, each `(B, H, S, past + S)`.
        audio_hidden_states: projected audio tokens, `(A, D)`.
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    audio_hidden_states: Tensor | None = None


class _Deferred:
    """A field that may be given as a function: it is called when the field is first read, and the result kept."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = "_" + name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return None  # the field's default
        value = instance.__dict__.get(self._name)
        if callable(value) and not isinstance(value, Tensor):
            value = instance.__dict__[self._name] = value()
        return value

    def __set__(self, instance: Any, value: Tensor | Callable[[], Tensor] | None) -> None:
        instance.__dict__[self._name] = value


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of `AudioFlamingo3ForConditionalGeneration`.

    Attributes:
        loss: mean cross-entropy over the labelled positions, a float32 scalar, when labels were given.
        logits: `(B, S, V)`, or the positions that `logits_to_keep` names; rows of padding are 0. Beside a loss they
            are computed when first read, because at ten minutes of audio they take gigabytes that training never needs.
        past_key_values: the cache, when one was used.
        hidden_states: embeddings, then the output of each layer (the last one normalised), each `(B, S, D)`.
        attentions: weights of each layer, each `(B, H, S, past + S)`.
        audio_hidden_states: projected audio tokens, `(A, D)`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = _Deferred()  # type: ignore[assignment]
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    audio_hidden_states: Tensor | None = None
