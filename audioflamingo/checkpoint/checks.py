"""What of a folder must fit together besides names and shapes: token ids, and the frequencies of time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from audioflamingo.checkpoint.weights import CONFIG_FILE, StoredTensor, is_component_folder
from audioflamingo.config import AudioFlamingo3Config, MusicFlamingoConfig
from audioflamingo.errors import AudioFlamingoWarning, CheckpointError
from audioflamingo.files import read_json
from audioflamingo.network.music_flamingo import time_frequencies

TIME_FREQUENCIES = ".pos_emb.freqs"


def find_token_id(folder: Path, token: str) -> int | None:
    """Looks a special token up in the tokenizer files of a folder; None if none of them knows it."""
    if (folder / "added_tokens.json").exists():
        found = read_json(folder / "added_tokens.json").get(token)
        if found is not None:
            return int(found)
    if (folder / "tokenizer_config.json").exists():
        for key, entry in read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            if isinstance(entry, dict) and entry.get("content") == token:
                return int(key)
    if (folder / "tokenizer.json").exists():
        with contextlib.suppress(CheckpointError):  # a damaged one is for whoever loads the tokenizer to say
            for entry in read_json(folder / "tokenizer.json").get("added_tokens", []):
                if isinstance(entry, dict) and entry.get("content") == token:
                    return int(entry["id"])
    return None


def check_token_ids(folder: Path, config: AudioFlamingo3Config) -> None:
    """Compares the ids of the tokens that stand for audio with those of the tokenizer beside the model, if any.

    Raises:
        CheckpointError: they disagree; audio would then land on other tokens' places.
    """
    if is_component_folder(folder):
        return
    for name, token in config.token_of.items():
        stated, found = getattr(config, name), find_token_id(folder, token)
        if found not in (None, stated):
            raise CheckpointError(
                f"{folder}: {name} is {stated} in {CONFIG_FILE}, but the tokenizer gives {token} the id {found}; one "
                "of the two files is another model's."
            )


def drop_time_frequencies(
    stored: Mapping[str, StoredTensor], config: AudioFlamingo3Config
) -> dict[str, StoredTensor]:
    """What a checkpoint stores, less the frequencies of the rotary time embedding that early conversions hold.

    The configuration says the same; a warning tells where it does not.
    """
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(TIME_FREQUENCIES)}
    if not isinstance(config, MusicFlamingoConfig):
        return dict(stored)
    for name in stored.keys() - kept.keys():
        tensor = stored[name]
        with safe_open(tensor.path, framework="pt", device="cpu") as file:
            found = file.get_tensor(tensor.key).float().flatten()
        expected = time_frequencies(config)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.01):
            warnings.warn(
                f"{tensor.path}: {tensor.key} holds other frequencies than the configuration gives; it is not used, as "
                "in transformers.",
                AudioFlamingoWarning,
                stacklevel=3,
            )
    return kept
