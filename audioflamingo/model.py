"""The public models: the network (`network`), loaded and saved (`checkpoint`), that answers (`engine`)."""

from __future__ import annotations

import os
from typing import Any

from audioflamingo.checkpoint.pretrained import PretrainedAudioFlamingo3, read_config
from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.engine.generate import generate as _generate
from audioflamingo.engine.generate import stream as _stream
from audioflamingo.engine.likelihood import score as _score
from audioflamingo.errors import ArgumentError
from audioflamingo.hub import resolve_folder
from audioflamingo.network.af3 import AudioFlamingo3Model
from audioflamingo.network.music_flamingo import MusicFlamingoModel, MusicFlamingoWithHead

__all__ = [
    "AudioFlamingo3ForConditionalGeneration",
    "AudioFlamingo3Model",
    "AutoModelForConditionalGeneration",
    "MusicFlamingoForConditionalGeneration",
    "MusicFlamingoModel",
]
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


class AudioFlamingo3ForConditionalGeneration(PretrainedAudioFlamingo3):
    """Audio Flamingo 3 with its output layer: the class to load, run, train and save.

    Args:
        config: architecture; the weights start random (`from_pretrained` loads trained ones).
    """

    generate = _generate
    stream = _stream
    score = _score


class MusicFlamingoForConditionalGeneration(MusicFlamingoWithHead, AudioFlamingo3ForConditionalGeneration):
    """Music Flamingo and Audio Flamingo Next: as `AudioFlamingo3ForConditionalGeneration`, and the time is heard.

    Args:
        config: architecture; the weights start random (`from_pretrained` loads trained ones).
    """


def model_class_of(config: AudioFlamingo3Config) -> type[AudioFlamingo3ForConditionalGeneration]:
    """The class of the model with such a configuration."""
    family = (AudioFlamingo3ForConditionalGeneration, MusicFlamingoForConditionalGeneration)
    for kind in family:
        if kind.config_class is type(config):
            return kind
    raise ArgumentError(f"config must be that of a model of the family, got {type(config).__name__}.")


class AutoModelForConditionalGeneration:
    """Loads a model of the family, whichever the folder holds."""

    @classmethod
    def from_pretrained(
        cls, id_or_path: str | os.PathLike[str], **options: Any
    ) -> AudioFlamingo3ForConditionalGeneration:
        """Takes the class from `config.json`; see `AudioFlamingo3ForConditionalGeneration.from_pretrained`.

        Raises:
            ConfigError: the model is none of the family.
        """
        where = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        folder = resolve_folder(id_or_path, **where)
        config = options.get("config") or read_config(folder)
        return model_class_of(config).from_pretrained(folder, **options)
