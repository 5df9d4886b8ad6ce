"""The files of a processor, in the places where checkpoints of different ages keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from audioflamingo.errors import CheckpointError
from audioflamingo.files import read_json

PROCESSOR_CLASS = "AudioFlamingo3Processor"


def read_processor_config(folder: Path) -> dict[str, Any]:
    """Contents of `processor_config.json`, if there is one, checked to be this model's."""
    config: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        found = content.get("processor_class", PROCESSOR_CLASS)
        if found != PROCESSOR_CLASS:
            raise CheckpointError(f"{folder / name} belongs to a {found}, not to {PROCESSOR_CLASS}.")
        config = config or (content if name == "processor_config.json" else {})
    return config


def read_feature_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the feature extractor: in the processor's own file, or in one of the older places."""
    if isinstance(config.get("feature_extractor"), dict):
        return config["feature_extractor"]
    for file in (folder / "preprocessor_config.json", folder / "sound_tower" / "preprocessor_config.json"):
        if file.exists():
            return read_json(file)
    if (folder / "sound_tower").is_dir():  # NVIDIA's layout, whose front end is the published one
        return {}
    raise CheckpointError(
        f"no processor_config.json with a feature extractor in {folder}, nor preprocessor_config.json."
    )
