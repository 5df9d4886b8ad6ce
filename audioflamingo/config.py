"""Configurations of the encoder, the language model, the whole model and of generation.

Plain dataclasses that check their values once, when they are built. Keys of a checkpoint's JSON that have no field
here are kept in `extra` and written back, so a load followed by a save loses nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from audioflamingo.errors import ArgumentError, ConfigError
from audioflamingo.json_config import JsonConfig, require_equal, require_positive, require_probability

Result = TypeVar("Result")
MODEL_TYPE = "audioflamingo3"
MUSIC_MODEL_TYPE = "musicflamingo"
ENCODER_MODEL_TYPE = "audioflamingo3_encoder"
TEXT_MODEL_TYPE = "qwen2"
AUDIO_TOKEN = "<sound>"  # the control token that stands for audio
AUDIO_BOS_TOKEN, AUDIO_EOS_TOKEN = (
    "<|sound_bos|>",
    "<|sound_eos|>",
)  # around the audio of a clip, in Music Flamingo
DEFAULT_TRANSCRIPTION_PROMPT = (
    "Transcribe the input speech."  # of Audio Flamingo 3; a checkpoint may name another
)
IGNORED_LABEL = -100  # a label that the loss leaves out
CHUNK_LENGTH_S = 30  # one window of the encoder
AUDIO_TOKENS_PER_S = 25  # what the language model sees of it


def _require_token(config: AudioFlamingo3Config, name: str) -> None:
    value, vocab_size = getattr(config, name), config.text_config.vocab_size
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ConfigError(f"{name} {value!r} is outside the vocabulary of {vocab_size}.")


@dataclass
class AudioFlamingo3EncoderConfig(JsonConfig):
    """The audio encoder (`audio_config`): Whisper large-v3's shape by default.

    Attributes:
        num_mel_bins: rows of the log-mel spectrogram.
        hidden_size: width of the encoder.
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads; they divide `hidden_size`.
        intermediate_size: width of the feed-forward part.
        activation_function: only `"gelu"` (exact, by erf).
        dropout, attention_dropout, activation_dropout, layerdrop: used in training mode only.
        initializer_range: standard deviation of freshly initialised weights.
        max_source_positions: encoder positions of one 30 s window.
    """

    model_type: ClassVar[str | None] = ENCODER_MODEL_TYPE
    accepted_model_types: ClassVar[tuple[str | None, ...]] = (
        "qwen2_audio_encoder",
        "musicflamingo_encoder",
        None,
    )
    older_names: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "encoder_layers": "num_hidden_layers",
        "encoder_attention_heads": "num_attention_heads",
        "encoder_ffn_dim": "intermediate_size",
        "encoder_layerdrop": "layerdrop",
    }

    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 20
    intermediate_size: int = 5120
    activation_function: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    initializer_range: float = 0.02
    max_source_positions: int = 1500

    def __post_init__(self) -> None:
        require_positive(
            self,
            *("num_mel_bins", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("intermediate_size", "max_source_positions"),
        )
        require_probability(self, "dropout", "attention_dropout", "activation_dropout", "layerdrop")
        require_equal(self, "activation_function", "gelu")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}."
            )


@dataclass
class Qwen2Config(JsonConfig):
    """The language model (`text_config`): Qwen2.5-7B's shape with Audio Flamingo 3's vocabulary by default.

    Attributes:
        vocab_size: rows of the token embeddings and of the output layer.
        hidden_size: width of the model.
        intermediate_size: width of the SwiGLU feed-forward part.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; they divide the query heads.
        head_dim: size of one head; `hidden_size / num_attention_heads` when None.
        max_position_embeddings: the context in tokens.
        rms_norm_eps: epsilon of the RMS norms.
        rope_theta: base of the rotary embedding (`rope_parameters.rope_theta` in newer files).
        hidden_act: only `"silu"`.
        attention_dropout: used in training mode only.
        initializer_range: standard deviation of freshly initialised weights.
    """

    model_type: ClassVar[str | None] = TEXT_MODEL_TYPE

    vocab_size: int = 151672
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        require_positive(
            self,
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        )
        require_probability(self, "attention_dropout")
        require_equal(self, "hidden_act", "silu")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        require_positive(self, "head_dim")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; the rotary embedding turns pairs.")

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._translate(values)
        for rope in (values.pop("rope_scaling", None) or {}, values.pop("rope_parameters", None) or {}):
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise ConfigError(f"rope_type {kind!r} is not implemented; only 'default' is.")
            if "rope_theta" in rope:
                values["rope_theta"] = rope["rope_theta"]
        if values.get("use_sliding_window"):
            raise ConfigError(
                "use_sliding_window = true is not implemented; Audio Flamingo 3 attends to everything."
            )
        return values

    def to_dict(self) -> dict[str, Any]:
        """The fields, named as in `config.json`."""
        values = super().to_dict()
        theta = values.pop("rope_theta")
        return {**values, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


@dataclass
class AudioFlamingo3Config(JsonConfig):
    """The whole model (`config.json`).

    Attributes:
        audio_config: the encoder; a dict is turned into `AudioFlamingo3EncoderConfig`.
        text_config: the language model; a dict is turned into `Qwen2Config`.
        audio_token_id: id of `<sound>`, whose embeddings are replaced by audio.
        projector_hidden_act: only `"gelu"` (exact, by erf).
        projector_bias: whether the projector's two layers have biases.
        dtype: name of the dtype of the stored weights, for example `"bfloat16"`; None when the file does not say.
    """

    model_type: ClassVar[str | None] = MODEL_TYPE
    older_names: ClassVar[dict[str, str]] = {"torch_dtype": "dtype"}
    architecture: ClassVar[str] = "AudioFlamingo3ForConditionalGeneration"
    token_of: ClassVar[dict[str, str]] = {"audio_token_id": AUDIO_TOKEN}  # what the ids here stand for

    audio_config: AudioFlamingo3EncoderConfig = None  # type: ignore[assignment]
    text_config: Qwen2Config = None  # type: ignore[assignment]
    audio_token_id: int = 151669
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.audio_config, AudioFlamingo3EncoderConfig):
            self.audio_config = AudioFlamingo3EncoderConfig.from_dict(self.audio_config or {})
        if not isinstance(self.text_config, Qwen2Config):
            self.text_config = Qwen2Config.from_dict(self.text_config or {})
        require_equal(self, "projector_hidden_act", "gelu")
        _require_token(self, "audio_token_id")

    @classmethod
    def _instead_of(cls, model_type: Any) -> str:
        return _which_instead(model_type)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads `config.json` of a local checkpoint folder.

        Raises:
            ConfigError: the file is absent, not JSON, of another model, or holds impossible values.
        """
        return _read(Path(folder) / "config.json", cls.from_dict)


@dataclass
class MusicFlamingoConfig(AudioFlamingo3Config):
    """Music Flamingo and Audio Flamingo Next (`config.json`): Audio Flamingo 3 that hears the time.

    Attributes:
        audio_bos_token_id, audio_eos_token_id: ids of the marks that stand before and behind the audio of a clip.
        audio_frame_step: seconds of one column of the spectrogram.
        rope_parameters: of the rotary time embedding, not of the text: `rope_theta` (its base, and the unit that
            positions are counted in) and `partial_rotary_factor` (the part of the encoder's width that each of the two
            axes turns).
    """

    model_type: ClassVar[str | None] = MUSIC_MODEL_TYPE
    accepted_model_types: ClassVar[tuple[str | None, ...]] = ("audioflamingonext",)
    architecture: ClassVar[str] = "MusicFlamingoForConditionalGeneration"
    token_of: ClassVar[dict[str, str]] = {
        "audio_token_id": AUDIO_TOKEN,
        "audio_bos_token_id": AUDIO_BOS_TOKEN,
        "audio_eos_token_id": AUDIO_EOS_TOKEN,
    }

    audio_bos_token_id: int = 151670
    audio_eos_token_id: int = 151671
    audio_frame_step: float = 0.01
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {"rope_type": "default", "rope_theta": 1200.0, "partial_rotary_factor": 0.2}
        self.rope_parameters = {**defaults, **(self.rope_parameters or {})}
        if self.rope_parameters["rope_type"] != "default":
            raise ConfigError(
                f"rope_type {self.rope_parameters['rope_type']!r} is not implemented; only 'default' is."
            )
        for name in ("audio_bos_token_id", "audio_eos_token_id"):
            _require_token(self, name)
        positions, num_channels = self.audio_config.max_source_positions // 2, 2 * self.num_rotary_channels
        theta = self.rope_parameters["rope_theta"]
        if not isinstance(theta, int | float) or theta < positions:
            raise ConfigError(
                f"rope_parameters.rope_theta must be at least {positions}, the positions of a window."
            )
        if not 0 < num_channels <= self.audio_config.hidden_size or num_channels % 4:
            raise ConfigError(
                f"rope_parameters.partial_rotary_factor {self.rope_parameters['partial_rotary_factor']} turns "
                f"{num_channels} of {self.audio_config.hidden_size} channels; it must be a multiple of 4, and no more."
            )

    @property
    def num_rotary_channels(self) -> int:
        """Channels of the encoder that each axis of the rotary time embedding turns."""
        return int(self.audio_config.hidden_size * self.rope_parameters["partial_rotary_factor"])

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._translate(values)
        rope = {name: values.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in values}
        values["rope_parameters"] = {**rope, **(values.get("rope_parameters") or {})}
        return values

    def to_dict(self) -> dict[str, Any]:
        """The fields, named as in `config.json`."""
        derived = {
            "max_position_embeddings": self.rope_parameters["rope_theta"],
            "head_dim": self.audio_config.hidden_size,
        }
        return {**super().to_dict(), **derived}


FAMILY: tuple[type[AudioFlamingo3Config], ...] = (AudioFlamingo3Config, MusicFlamingoConfig)


def config_class_of(model_type: str | None) -> type[AudioFlamingo3Config]:
    """The configuration of a type of model.

    Raises:
        ConfigError: it is none of the family.
    """
    for kind in FAMILY:
        if model_type in (kind.model_type, *kind.accepted_model_types):
            return kind
    raise ConfigError(f"model_type {model_type!r}: {_which_instead(model_type)}")


def _which_instead(model_type: Any) -> str:
    """Says what another type of model is loaded with, if anything."""
    for kind in FAMILY:
        if model_type in (kind.model_type, *kind.accepted_model_types):
            return f"load it with {kind.architecture}, or with AutoModelForConditionalGeneration."
    known = ", ".join(repr(kind.model_type) for kind in FAMILY)
    return f"this package runs {known} only, and another model's weights would give plausible nonsense."


def _hint(path: Path) -> str:
    """What is behind a configuration that cannot be read: transformers' Trainer saves weights alone."""
    if path.exists() or not (path.parent / "training_args.bin").exists():
        return ""
    return ". It is a checkpoint of transformers' Trainer: pass config=model.config, or save with save_pretrained"


def _read(path: Path, understand: Callable[[Any], Result]) -> Result:
    """What a JSON file means; whatever is wrong with it is a `ConfigError` that names it."""
    try:
        return understand(json.loads(path.read_text(encoding="utf-8")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}{_hint(path)}") from error


def read_model_config(folder: str | Path) -> AudioFlamingo3Config:
    """Reads `config.json` of a local checkpoint folder, whichever model of the family it is.

    Raises:
        ConfigError: as `AudioFlamingo3Config.from_pretrained`.
    """

    def kind_of(values: Any) -> type[AudioFlamingo3Config]:
        is_named = isinstance(values, dict)
        return config_class_of(values.get("model_type", MODEL_TYPE) if is_named else MODEL_TYPE)

    return _read(Path(folder) / "config.json", kind_of).from_pretrained(folder)


@dataclass
class GenerationConfig(JsonConfig):
    """Defaults of `generate` (`generation_config.json`); what the caller passes wins.

    Attributes:
        max_new_tokens: most tokens to add to the prompt. Used unless `max_length` is given.
        max_length: most tokens of prompt and answer together; None for no such limit.
        min_new_tokens: fewest tokens before an end-of-sequence token may be chosen.
        min_length: the same for prompt and answer together; used unless `min_new_tokens` is given.
        do_sample: draw from the distribution; otherwise take the most likely token.
        temperature, top_k, top_p, min_p: shape the distribution that is drawn from (0, -1 or None of `top_k`: off).
        repetition_penalty: above 1 makes tokens that are already in the prompt or answer less likely.
        frequency_penalty: taken from a token's logit for each time that the answer holds it already.
        presence_penalty: taken once from the logits of the tokens that the answer holds.
        no_repeat_ngram_size: forbid repeating n-grams of this length; 0 is off.
        num_beams: beams of beam search; 1 is off.
        length_penalty: exponent of the length that a beam's score is divided by.
        early_stopping: True, False or `"never"`: when beam search may stop.
        num_return_sequences: answers a prompt.
        bos_token_id, pad_token_id: special ids as the checkpoint states them.
        eos_token_id: one id or a list: any of them ends an answer.
        stop_strings: one text or a list: an answer ends when it holds any of them; `generate` then needs a tokenizer.
    """

    max_new_tokens: int | None = 1024
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    stop_strings: str | list[str] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the defaults from a parsed JSON object; a null stands for the default of that field."""
        config = super().from_dict({name: value for name, value in values.items() if value is not None})
        if config.max_length is not None and "max_new_tokens" not in values:
            config.max_new_tokens = None  # the file limits the answer in its own way
        return config

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON takes them, without those that say nothing; the penalties are not transformers' names."""
        silent = {"frequency_penalty": 0, "presence_penalty": 0}
        values = super().to_dict().items()
        return {name: value for name, value in values if value is not None and value != silent.get(name)}

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed.

        Raises:
            ArgumentError: a name that is not a field.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ArgumentError(f"GenerationConfig has no field {unknown[0]!r}.")
        return dataclasses.replace(self, **changes)
