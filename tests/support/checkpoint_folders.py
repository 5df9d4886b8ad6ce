"""Checkpoint folders for tests: NVIDIA's layout, edits that damage a folder, and a comparison of models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_model import AUDIO_TOKEN_ID, tiny_config_dict

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def assert_equal_state(model: Any, expected: Any) -> None:
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def make_nvidia_folder(folder: Path, model: Any) -> None:
    """Writes NVIDIA's original layout: three folders, each with the configuration of its part."""
    parts: dict[str, dict[str, torch.Tensor]] = {"llm": {}, "sound_tower": {}, "sound_mm_projector": {}}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.audio_tower."):
            parts["sound_tower"][name.removeprefix("model.audio_tower.")] = tensor
        elif name.startswith("model.multi_modal_projector.linear_"):
            number, leaf = name.removeprefix("model.multi_modal_projector.linear_").split(".")
            parts["sound_mm_projector"][f"layers.{2 * int(number) - 2}.{leaf}"] = tensor
        else:
            parts["llm"][name.replace("model.language_model.", "model.")] = tensor
    config = tiny_config_dict()
    audio, text = config["audio_config"], config["text_config"]
    configs = {
        "llm": {
            "_name_or_path": "/elsewhere/llm",
            "architectures": ["Qwen2ForCausalLM"],
            "torch_dtype": "float32",
            "eos_token_id": 7,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            **{key: value for key, value in text.items() if key != "rope_parameters"},
        },
        "sound_tower": {
            "architectures": ["Qwen2AudioEncoder"],
            "model_type": "qwen2_audio_encoder",
            "d_model": audio["hidden_size"],
            "encoder_layers": audio["num_hidden_layers"],
            "encoder_attention_heads": audio["num_attention_heads"],
            "encoder_ffn_dim": audio["intermediate_size"],
            "num_mel_bins": 128,
            "torch_dtype": "float16",
        },
        "sound_mm_projector": {"model_type": "sound_mm_projector", "sound_mm_projector_type": "mlp"},
    }
    for part, tensors in parts.items():
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / SINGLE, {"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    (folder / "llm/added_tokens.json").write_text(json.dumps({"<sound>": AUDIO_TOKEN_ID}))
