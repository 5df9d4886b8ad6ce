"""Music Flamingo beside transformers' on the same weights: time, logits, loss, answers, ids, folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import audioflamingo
from audioflamingo import (
    AutoModelForConditionalGeneration,
    AutoProcessor,
    MusicFlamingoForConditionalGeneration,
)
from audioflamingo.config import MusicFlamingoConfig
from audioflamingo.network.music_flamingo import RotaryTimeEmbedding
from tests.support.checkpoint_folders import assert_equal_state
from tests.support.tiny_family import (
    BOS_ID,
    EOS_ID,
    make_music_batch,
    music_config_dict,
    tiny_music_model,
    tiny_music_reference,
    write_music_processor,
)
from tests.support.tiny_model import AUDIO_TOKEN_ID

transformers = pytest.importorskip("transformers")

WINDOWS = {
    "0.05": [5],
    "2.5": [250],
    "30": [3000],
    "30.03": [3000, 3],  # the reference fails where the last window has no audio token
    "59.99": [3000, 2999],
    "65.2": [3000, 3000, 520],
}


@pytest.fixture(scope="module")
def models():
    return tiny_music_model(), tiny_music_reference()


@pytest.mark.parametrize("window", [0, 1, 39, 59])
def test_time_turns_by_the_very_same_angles(window) -> None:
    """At the published width: cosines and sines equal to the bit, at any minute."""
    from transformers.models.musicflamingo.modeling_musicflamingo import (
        MusicFlamingoRotaryEmbedding,
        apply_rotary_time_emb,
    )

    theirs = MusicFlamingoRotaryEmbedding(transformers.MusicFlamingoConfig())
    timestamps = (
        torch.tensor([window]).unsqueeze(1) * 750 * 0.04 + torch.arange(750, dtype=torch.float32) * 0.04
    )
    cos, sin = theirs(timestamps, seq_len=750)
    ours = RotaryTimeEmbedding(MusicFlamingoConfig())
    angles = ours.angles(torch.full((750,), window), torch.arange(750))
    assert torch.equal(angles.cos().repeat_interleave(2, 1), cos[0])
    assert torch.equal(angles.sin().repeat_interleave(2, 1), sin[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.randn(750, 1280, generator=torch.Generator().manual_seed(window)).to(dtype)
        assert torch.equal(ours(rows, [750], [window]), apply_rotary_time_emb(rows, cos[0], sin[0]))
        assert torch.equal(ours(rows[:62], [62], [window]), ours(rows, [750], [window])[:62])


@torch.no_grad()
@pytest.mark.parametrize("seconds", WINDOWS)
def test_every_length(models, seconds) -> None:
    ours, theirs = models
    batch = make_music_batch([([WINDOWS[seconds]], 6)], seed=len(seconds))
    audio = (batch["input_features"], batch["input_features_mask"], batch["input_ids"])
    got, expected = ours.get_audio_features(*audio), theirs.get_audio_features(*audio)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-3, rtol=0)


@torch.no_grad()
def test_thirty_minutes(models) -> None:
    """60 windows: the time is what it is in the reference to the last one."""
    ours, theirs = models
    batch = make_music_batch([([[3000] * 59 + [2990]], 8)])
    audio = (batch["input_features"], batch["input_features_mask"], batch["input_ids"])
    got, expected = ours.get_audio_features(*audio), theirs.get_audio_features(*audio)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batches_of_mixed_lengths(models, padding_side) -> None:
    ours, theirs = models
    rows = [([[50]], 5), ([[3000, 100]], 9), ([[3]], 30), ([[730]], 2)]
    batch = make_music_batch(rows, padding_side)
    mask = batch["attention_mask"].bool()
    got, expected = ours(**batch), theirs(**batch)
    torch.testing.assert_close(got.logits[mask], expected.logits[mask], atol=2e-3, rtol=0)
    labels = batch["input_ids"].masked_fill(~mask, -100)
    for token in (AUDIO_TOKEN_ID, BOS_ID, EOS_ID):
        labels = labels.masked_fill(labels == token, -100)
    got, expected = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-4, rtol=0)


def test_gradients() -> None:
    ours, theirs = tiny_music_model().train(), tiny_music_reference().train()
    batch = make_music_batch([([[50]], 9), ([[3000, 300]], 12)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours(**batch, labels=labels).loss.backward()
    theirs(**batch, labels=labels).loss.backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if reference[name].grad is not None:
            torch.testing.assert_close(parameter.grad, reference[name].grad, atol=1e-4, rtol=0, msg=name)


@torch.no_grad()
def test_greedy_answers(models) -> None:
    ours, theirs = models
    for rows in ([([[3000, 3000, 520]], 6)], [([[50]], 5), ([[3000, 100]], 9)], [([], 7), ([], 4)]):
        batch = make_music_batch(rows)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 7}
        assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_folders_go_both_ways(tmp_path: Path) -> None:
    reference = tiny_music_reference()
    reference.save_pretrained(tmp_path / "theirs")
    ours = AutoModelForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert type(ours) is MusicFlamingoForConditionalGeneration
    assert_equal_state(ours, reference)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert_equal_state(again, reference)
    again.save_pretrained(tmp_path / "again")
    AutoModelForConditionalGeneration.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "last")
    got, expected = (transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("last", "again"))
    assert got.to_dict() == {**expected.to_dict(), "_name_or_path": got.to_dict().get("_name_or_path")}


def test_default_configurations_are_equal() -> None:
    got = transformers.MusicFlamingoConfig(**MusicFlamingoConfig.from_dict({}).to_dict()).to_dict()
    expected = transformers.MusicFlamingoConfig().to_dict()
    for name in ("rope_parameters", "max_position_embeddings", "head_dim", "audio_frame_step"):
        assert got[name] == expected[name], name
    assert [got[f"audio_{name}token_id"] for name in ("", "bos_", "eos_")] == [
        expected[f"audio_{name}token_id"] for name in ("", "bos_", "eos_")
    ]


def tone(seconds: float) -> np.ndarray:
    time = np.arange(int(16000 * seconds)) / 16000
    return (0.3 * np.sin(2 * np.pi * 330 * time)).astype(np.float32)


def conversation(seconds: float, text: str = "What is the audio") -> list[dict]:
    parts = [{"type": "text", "text": text}, {"type": "audio", "audio": tone(seconds)}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("lengths", [[2.5], [31.0], [61.0, 0.4]])
@pytest.mark.parametrize("labels", [False, True])
def test_the_processor_gives_the_same_batch(tmp_path: Path, lengths, labels) -> None:
    write_music_processor(tmp_path)
    ours = AutoProcessor.from_pretrained(tmp_path)
    assert type(ours) is audioflamingo.MusicFlamingoProcessor
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "again")
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    conversations = [conversation(seconds) for seconds in lengths]
    got = ours.apply_chat_template(conversations, output_labels=labels, **options)
    reference_options = {**options, "processor_kwargs": {"output_labels": True}} if labels else options
    for reference in (theirs, again):
        expected = reference.apply_chat_template(conversations, **reference_options)
        assert got.keys() == expected.keys()
        for name in got:
            if name != "input_features":
                assert torch.equal(got[name], expected[name]), name
        torch.testing.assert_close(got["input_features"], expected["input_features"], atol=1e-4, rtol=0)
    assert got["input_ids"][0].tolist().count(BOS_ID) == 1


def test_published_config_dict_round_trip() -> None:
    values = music_config_dict()
    assert MusicFlamingoConfig.from_dict(values).to_dict()["rope_parameters"] == values["rope_parameters"]
