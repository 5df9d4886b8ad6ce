"""A model built from an encoder and texts: it loads here and in transformers, with equal logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audioflamingo.errors import CheckpointError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.new_model import FIXED_PHRASES, NewModelConfig, main, new_model
from tests.tiny_training import conversation, write_clip, write_rows

TEXTS = ["the capital of france", "why do you think so", "hello world"] * 20
CONFIG = NewModelConfig(vocab_size=400, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """80 mels, as the small Whisper models have; one head of 64."""
    from audioflamingo.config import AudioFlamingo3EncoderConfig
    from audioflamingo.network.encoder import AudioFlamingo3Encoder

    torch.manual_seed(0)
    tower = AudioFlamingo3Encoder(
        AudioFlamingo3EncoderConfig(
            num_mel_bins=80, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96
        )
    )
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file({f"audio_tower.{name}": tensor.half() for name, tensor in tower.state_dict().items()}, path)
    return path


def test_it_loads_and_equals_transformers(encoder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    built = new_model(tmp_path / "m", encoder, TEXTS, CONFIG)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path / "m")
    processor = AudioFlamingo3Processor.from_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters(), strict=True))
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id

    messages = conversation("clip", "hello", 0.5)["messages"][:1]
    messages[0]["content"][1]["path"] = str(write_clip(tmp_path / "clip.wav", 0.5, 0))
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "m")
    reference_inputs = theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert torch.equal(inputs["input_ids"], torch.as_tensor(reference_inputs["input_ids"]))
    reference = transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_extra_encoder_layers_change_nothing_until_they_are_trained(encoder: Path, tmp_path: Path) -> None:
    new_model(tmp_path / "plain", encoder, TEXTS, CONFIG)
    new_model(tmp_path / "more", encoder, TEXTS, dataclasses.replace(CONFIG, extra_encoder_layers=2))
    plain, more = (
        AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("plain", "more")
    )
    assert more.config.audio_config.num_hidden_layers == 4
    features = torch.randn(1, 80, 300, generator=torch.Generator().manual_seed(0))
    expected = plain.model.audio_tower(features).audio_tokens
    assert torch.equal(more.model.audio_tower(features).audio_tokens, expected)
    more.model.audio_tower(features).audio_tokens.square().sum().backward()
    assert more.model.audio_tower.layers[3].fc2.weight.grad.abs().max() > 0


def test_words_of_the_fixed_phrases_are_single_tokens(encoder: Path, tmp_path: Path) -> None:
    new_model(tmp_path, encoder, TEXTS, CONFIG)
    tokenizer = AudioFlamingo3Processor.from_pretrained(tmp_path).tokenizer
    for phrase in FIXED_PHRASES[:3]:
        assert len(tokenizer.encode_plain(phrase)) <= len(phrase.split()) + 1
    text = "Größe ☃ 12"
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text
    assert len(tokenizer) <= CONFIG.vocab_size
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"] == len(tokenizer)


def test_the_command_and_its_errors(encoder: Path, tmp_path: Path, capsys) -> None:
    texts = write_rows(
        tmp_path / "rows.jsonl", [conversation(str(i), text, 1.0) for i, text in enumerate(TEXTS)]
    )
    shape = ["--hidden-size", "32", "--num-layers", "1", "--num-heads", "4", "--vocab-size", "300"]
    assert main([str(tmp_path / "m"), "--encoder", str(encoder), "--texts", str(texts), *shape]) == 0
    assert "float16" in capsys.readouterr().out
    assert main([str(tmp_path / "m"), "--encoder", str(texts), "--texts", str(texts)]) == 1
    assert "cannot read the encoder" in capsys.readouterr().err
    save_file({"conv1.weight": torch.zeros(64, 80, 3)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="not an audio encoder"):
        new_model(tmp_path / "m", tmp_path / "odd.safetensors", TEXTS, CONFIG)
