"""A tiny Audio Flamingo 3 with random weights, and inputs for it, for tests that need a model but no meaning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration

AUDIO_TOKEN_ID = 500
VOCAB_SIZE = 512


def tiny_config_dict(**text_changes: Any) -> dict[str, Any]:
    """`config.json` of a model that keeps AF3's front end (128 mels, 1500 positions) and shrinks the rest."""
    return {
        "model_type": "audioflamingo3",
        "audio_token_id": AUDIO_TOKEN_ID,
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 20000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            **text_changes,
        },
    }


def randomize(model: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Gives every trained parameter (norms and biases too) a random value, so that a mix-up of any two shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def built(model_class: type[Any], config: AudioFlamingo3Config, seed: int) -> Any:
    """A model of random weights in evaluation mode; equal seeds give equal weights."""
    model = model_class(config)
    randomize(model, seed)
    return model.eval()


def reference_of(model: nn.Module, family: str, config: dict[str, Any]) -> Any:
    """transformers' model of a family, say `"MusicFlamingo"`, with the very weights of ours."""
    import transformers

    reference = getattr(transformers, f"{family}ForConditionalGeneration")(
        getattr(transformers, f"{family}Config")(**config)
    )
    reference.load_state_dict(model.state_dict())
    return reference.eval()


def tiny_model(seed: int = 0, **text_changes: Any) -> AudioFlamingo3ForConditionalGeneration:
    """The tiny model in evaluation mode; equal seeds give equal weights."""
    config = AudioFlamingo3Config.from_dict(tiny_config_dict(**text_changes))
    return built(AudioFlamingo3ForConditionalGeneration, config, seed)


def tiny_reference(seed: int = 0, **text_changes: Any) -> Any:
    """transformers' model with the very weights of `tiny_model(seed)`."""
    model = tiny_model(seed, **text_changes)
    return reference_of(model, "AudioFlamingo3", tiny_config_dict(**text_changes))


def tokens_of(frames: int) -> int:
    """Audio tokens of one window, written out here so that the package's own formula is checked against it."""
    return (((frames - 1) // 2 + 1) - 2) // 2 + 1


def make_batch(
    rows: list[tuple[list[int], int]], padding_side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of one row per `(frames of each window, number of text tokens)`; windows hold noise.

    Padded frames hold noise too, so whatever looks at them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(10, 400, (num_text,), generator=generator).tolist() for _, num_text in rows]
    sequences = []
    for (windows, _), text in zip(rows, texts, strict=True):
        audio = [AUDIO_TOKEN_ID] * sum(tokens_of(frames) for frames in windows)
        sequences.append(text[:2] + audio + text[2:])
    longest = max(map(len, sequences))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if padding_side == "left" else 0
        input_ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask[row, start : start + len(sequence)] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    frames = [n for windows, _ in rows for n in windows]
    if frames:
        batch["input_features"] = torch.randn(len(frames), 128, 3000, generator=generator)
        batch["input_features_mask"] = (torch.arange(3000) < torch.tensor(frames)[:, None]).int()
    return batch
