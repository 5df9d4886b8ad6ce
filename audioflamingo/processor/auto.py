"""The processor of a checkpoint, whichever model of the family it is."""

from __future__ import annotations

import os
from typing import Any

from audioflamingo.config import MODEL_TYPE, config_class_of
from audioflamingo.errors import CheckpointError, unknown_arguments
from audioflamingo.files import read_json
from audioflamingo.hub import PROCESSOR_FILES, resolve_folder
from audioflamingo.processor.folders import read_processor_config
from audioflamingo.processor.music_flamingo import MusicFlamingoProcessor
from audioflamingo.processor.processor import AudioFlamingo3Processor

PROCESSORS: tuple[type[AudioFlamingo3Processor], ...] = (AudioFlamingo3Processor, MusicFlamingoProcessor)
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


class AutoProcessor:
    """Loads the processor of a checkpoint, under the name that programs written for transformers use."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> AudioFlamingo3Processor:
        """Takes the class from the folder: as its processor's file says, or else its `config.json`.

        See `AudioFlamingo3Processor.from_pretrained` for the options.

        Raises:
            CheckpointError, ConfigError: the processor is none of the family's.
        """
        known = {name for kind in PROCESSORS for name in kind.settings} | set(_HUB_OPTIONS)
        if unknown := [name for name in options if name not in known]:
            raise unknown_arguments("from_pretrained()", unknown, known)
        where = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        folder = resolve_folder(pretrained_model_name_or_path, allow_patterns=PROCESSOR_FILES, **where)
        name = read_processor_config(folder)["processor_class"]
        if name is None:
            has_config = (folder / "config.json").exists() and not (
                folder / "llm"
            ).is_dir()  # NVIDIA's layout
            values = read_json(folder / "config.json") if has_config else {}
            config_class = config_class_of(values.get("model_type", MODEL_TYPE))
            kind = next(kind for kind in PROCESSORS if kind.config_class is config_class)
            return kind.from_pretrained(folder, **options)
        for kind in PROCESSORS:
            if name in (kind.__name__, *kind.aliases):
                return kind.from_pretrained(folder, **options)
        classes = " nor a ".join(kind.__name__ for kind in PROCESSORS)
        raise CheckpointError(f"the processor in {folder} is a {name}, not a {classes}.")
