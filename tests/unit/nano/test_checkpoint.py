"""A checkpoint of the built-in model's training holds what training changes, and fits the same vocabulary only."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from audioflamingo import AudioFlamingo3ForConditionalGeneration
from recipes.nano.nano_model.training.checkpoint import keep, lay_over
from tests.support.tiny_model import tiny_model


@pytest.fixture
def folders(tmp_path):
    """Two models with the same vocabulary."""
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}}
    for seed, indent in ((0, None), (1, 2)):  # written in two ways
        folder = tmp_path / str(seed)
        tiny_model(seed).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary, indent=indent))
    return tmp_path / "0", tmp_path / "1"


def test_all_but_encoder_and_embeddings_is_laid_over(folders, tmp_path):
    trained, constructed = folders
    size = keep(trained, tmp_path / "checkpoint.safetensors")
    assert size == (tmp_path / "checkpoint.safetensors").stat().st_size
    names = load_file(tmp_path / "checkpoint.safetensors").keys()
    assert not [name for name in names if "audio_tower" in name or "embed_tokens" in name]
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(constructed)
    lay_over(model, constructed, tmp_path / "checkpoint.safetensors")
    source = dict(AudioFlamingo3ForConditionalGeneration.from_pretrained(trained).named_parameters())
    before = dict(AudioFlamingo3ForConditionalGeneration.from_pretrained(constructed).named_parameters())
    for name, tensor in model.named_parameters():
        if "audio_tower" in name or "embed_tokens" in name:
            assert torch.equal(tensor, before[name])
        else:
            torch.testing.assert_close(tensor, source[name].half().to(tensor.dtype))


def test_another_vocabulary_or_shape_is_refused(folders, tmp_path):
    trained, constructed = folders
    file = tmp_path / "checkpoint.safetensors"
    keep(trained, file)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(constructed)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(SystemExit, match="no place"):
        lay_over(model, constructed, file)
    (constructed / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1, "b": 0}}}')
    with pytest.raises(SystemExit, match="vocabulary"):
        lay_over(model, constructed, file)
