"""Configurations: older names, unknown keys, refused values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from audioflamingo.config import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    GenerationConfig,
    Qwen2Config,
)
from audioflamingo.errors import AudioFlamingoError, ConfigError
from tests.support.tiny_model import tiny_config_dict


def test_defaults_are_the_published_model() -> None:
    config = AudioFlamingo3Config()
    assert (config.audio_config.hidden_size, config.audio_config.num_hidden_layers) == (1280, 32)
    assert (config.text_config.hidden_size, config.text_config.head_dim) == (3584, 128)
    assert config.audio_token_id == 151669


def test_older_names_are_read() -> None:
    older = {
        "d_model": 64,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "encoder_layerdrop": 0.1,
    }
    config = AudioFlamingo3EncoderConfig.from_dict(older)
    assert config.hidden_size == 64
    assert config.num_hidden_layers == 3
    assert config.num_attention_heads == 4
    assert config.intermediate_size == 96
    assert config.layerdrop == 0.1
    text = Qwen2Config.from_dict({"rope_theta": 5e5, "rope_scaling": None})
    assert text.rope_theta == 5e5
    assert AudioFlamingo3Config.from_dict({**tiny_config_dict(), "torch_dtype": "float16"}).dtype == "float16"


def test_contradicting_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"d_model = 64 contradicts hidden_size = 32"):
        AudioFlamingo3EncoderConfig.from_dict({"d_model": 64, "hidden_size": 32})


def test_rope_parameters_win_over_the_older_place() -> None:
    config = Qwen2Config.from_dict({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e6}})
    assert config.rope_theta == 2e6
    assert config.to_dict()["rope_parameters"] == {"rope_type": "default", "rope_theta": 2e6}


def test_unknown_keys_survive() -> None:
    values = tiny_config_dict() | {"transformers_version": "4.57", "my_key": [1, {"a": None}]}
    values["text_config"]["use_cache"] = True
    values["audio_config"]["scale_embedding"] = False
    written = json.loads(json.dumps(AudioFlamingo3Config.from_dict(values).to_dict()))
    assert written["my_key"] == [1, {"a": None}]
    assert written["transformers_version"] == "4.57"
    assert written["text_config"]["use_cache"] is True
    assert written["audio_config"]["scale_embedding"] is False
    assert AudioFlamingo3Config.from_dict(written).to_dict() == written


@pytest.mark.parametrize("model_type", ["musicflamingo", "qwen2_audio", "voxtral", "whisper"])
def test_other_models_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(ConfigError, match=model_type):
        AudioFlamingo3Config.from_dict({**tiny_config_dict(), "model_type": model_type})


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("audio_config", "hidden_size", 30),
        ("audio_config", "num_hidden_layers", 0),
        ("audio_config", "activation_function", "gelu_new"),
        ("audio_config", "dropout", 1.5),
        ("audio_config", "model_type", "clap"),
        ("text_config", "num_key_value_heads", 3),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "head_dim", 7),
        ("text_config", "vocab_size", "many"),
        ("text_config", "vocab_size", 100),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("text_config", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("text_config", "use_sliding_window", True),
        ("text_config", "model_type", "llama"),
        (None, "projector_hidden_act", "relu"),
        (None, "audio_token_id", -1),
        (None, "text_config", [1]),
    ],
)
def test_impossible_values_are_refused(part: str | None, key: str, value: object) -> None:
    values = tiny_config_dict()
    (values if part is None else values[part])[key] = value
    with pytest.raises(ConfigError):
        AudioFlamingo3Config.from_dict(values)


def test_from_pretrained_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        AudioFlamingo3Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"config\.json"):
        AudioFlamingo3Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict()))
    assert AudioFlamingo3Config.from_pretrained(tmp_path).text_config.vocab_size == 512


def test_generation_config_keeps_eos_lists_and_unknown_keys() -> None:
    config = GenerationConfig.from_dict(
        {"eos_token_id": [151645, 151643], "transformers_version": "5", "top_p": None}
    )
    assert config.eos_token_id == [151645, 151643]
    assert config.top_p == 1.0
    assert config.to_dict()["transformers_version"] == "5"
    assert config.replace(max_new_tokens=3).max_new_tokens == 3
    with pytest.raises(AudioFlamingoError, match="max_tokens"):
        config.replace(max_tokens=3)
