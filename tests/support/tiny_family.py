"""A tiny Music Flamingo with random weights, its processor, and inputs for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audioflamingo.config import MusicFlamingoConfig
from audioflamingo.model import MusicFlamingoForConditionalGeneration
from tests.support.tiny_model import AUDIO_TOKEN_ID, built, reference_of, tiny_config_dict, tokens_of
from tests.support.tiny_tokenizer import add_control_tokens, write_json, write_tiny_processor

BOS_ID, EOS_ID = 501, 502


def music_config_dict(**text_changes: Any) -> dict[str, Any]:
    """`config.json` of the tiny model."""
    return {
        **tiny_config_dict(**text_changes),
        "model_type": "musicflamingo",
        "audio_bos_token_id": BOS_ID,
        "audio_eos_token_id": EOS_ID,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1200.0, "partial_rotary_factor": 0.25},
    }


def tiny_music_model(seed: int = 0, **text_changes: Any) -> MusicFlamingoForConditionalGeneration:
    """The tiny model in evaluation mode; equal seeds give equal weights."""
    config = MusicFlamingoConfig.from_dict(music_config_dict(**text_changes))
    return built(MusicFlamingoForConditionalGeneration, config, seed)


def tiny_music_reference(seed: int = 0, **text_changes: Any) -> Any:
    """transformers' model with the very weights of `tiny_music_model(seed)`."""
    model = tiny_music_model(seed, **text_changes)
    return reference_of(model, "MusicFlamingo", music_config_dict(**text_changes))


def make_music_batch(
    rows: list[tuple[list[list[int]], int]], padding_side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of one row per `(clips, number of text tokens)`; a clip is the frames of each of its windows."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for clips, num_text in rows:
        text = torch.randint(10, 400, (num_text,), generator=generator).tolist()
        audio = []
        for windows in clips:
            audio += [BOS_ID, *[AUDIO_TOKEN_ID] * sum(map(tokens_of, windows)), EOS_ID]
        sequences.append(text[:2] + audio + text[2:])
    longest = max(map(len, sequences))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if padding_side == "left" else 0
        input_ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask[row, start : start + len(sequence)] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    frames = [n for clips, _ in rows for windows in clips for n in windows]
    if frames:
        batch["input_features"] = torch.randn(len(frames), 128, 3000, generator=generator)
        batch["input_features_mask"] = (torch.arange(3000) < torch.tensor(frames)[:, None]).int()
    return batch


def write_music_processor(folder: Path, max_audio_len: int = 1200) -> Path:
    """Writes the folder of the tiny processor, as transformers would."""
    write_tiny_processor(folder)
    add_control_tokens(folder, ["<|sound_bos|>", "<|sound_eos|>"])
    content = {
        "processor_class": "MusicFlamingoProcessor",
        "audio_token": "<sound>",
        "audio_bos_token": "<|sound_bos|>",
        "audio_eos_token": "<|sound_eos|>",
        "max_audio_len": max_audio_len,
    }
    config = json.loads((folder / "processor_config.json").read_text())
    write_json(
        folder / "processor_config.json", {"feature_extractor": config["feature_extractor"], **content}
    )
    return folder
