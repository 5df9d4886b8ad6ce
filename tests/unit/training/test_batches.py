"""Batches, losses, gradients and trained parameters: equal to those of the plain forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from audioflamingo.audio import load_audio
from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.errors import ConfigError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.training.augmentation import (
    add_reverb,
    augment_waveform,
    change_speed,
    limit_band,
    mask_features,
    mask_rows,
    mix_noise,
)
from audioflamingo.training.batches import BatchEncoder, ctc_targets
from audioflamingo.training.feature_cache import FeatureCache, encoder_hash
from audioflamingo.training.module import TrainingModule
from audioflamingo.training.parts import (
    UNADAPTED_KEY,
    add_lora,
    build_optimizer,
    cached_layers,
    frozen_layers,
    select_parameters,
)
from audioflamingo.training.training_config import (
    AugmentationConfig,
    FeatureCacheConfig,
    LoraSettings,
    SpecAugmentConfig,
    StageConfig,
)
from tests.support.tiny_model import tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor
from tests.support.tiny_training import write_dataset


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    processor = AudioFlamingo3Processor.from_pretrained(write_tiny_processor(folder / "model"))
    rows = read_dataset(DatasetConfig(str(write_dataset(folder / "data", 5)))).rows
    return folder, processor, rows


def make_cache(
    folder: Path, model, processor, rows, augmentation=None, num_layers=None, **options
) -> FeatureCache:
    config = FeatureCacheConfig(str(folder / "cache"), **options)
    encoder_id = encoder_hash(model, processor, num_layers)
    cache = FeatureCache(config, augmentation or AugmentationConfig(), encoder_id, 32, num_layers)
    paths = [path for row in rows for path in row.audio]
    cache.build(cache.missing(paths), model, processor)
    return cache


def plain_inputs(processor, rows):
    """The rows as a user of the package would prepare them."""
    return processor.apply_chat_template(
        [row.messages for row in rows],
        tokenize=True,
        return_dict=True,
        output_labels="assistant",
        padding_side="right",
    )


def gradients(module, loss) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_plain_forward_with_and_without_cache(parts) -> None:
    folder, processor, rows = parts
    model = tiny_model().train()
    select_parameters(model, StageConfig({"projector": 1.0, "language_model": 1.0}, max_steps=1))
    inputs = plain_inputs(processor, rows)
    plain = model(**inputs, logits_to_keep=1).loss
    expected = gradients(model, plain)
    module = TrainingModule(model)
    for cache, tolerance in ((None, 1e-6), (make_cache(folder, model, processor, rows), 2e-2)):
        batch = BatchEncoder(processor, None, cache)(rows)
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(getattr(batch, name), inputs[name])
        assert batch.num_labels == (inputs["labels"][:, 1:] != -100).sum()
        loss = module(batch)["answer"] / batch.num_labels
        torch.testing.assert_close(loss, plain, rtol=tolerance / 10, atol=1e-6)
        found = gradients(module, loss)
        assert set(found) == {f"model.{name}" for name in expected}
        for name, gradient in expected.items():  # the cache holds float16
            error = (found[f"model.{name}"] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < tolerance, name


def test_the_last_layers_learn_from_the_cached_output_of_the_first(parts, tmp_path: Path) -> None:
    """Gradients of the trained layer equal those of the plain forward, over clips of one window and of two."""
    _, processor, _ = parts
    rows = read_dataset(DatasetConfig(str(write_dataset(tmp_path / "data", 3, extra_s=29.9)))).rows
    assert max(row.duration_s for row in rows) > 30
    model = tiny_model().train()
    stage = StageConfig({"encoder": 1.0, "projector": 1.0}, max_steps=1, encoder_last_layers=1)
    select_parameters(model, stage)
    assert cached_layers([stage], 2) == 1
    inputs = plain_inputs(processor, rows)
    plain = model(**inputs, logits_to_keep=1).loss
    expected = gradients(model, plain)
    assert any("audio_tower.layers.1." in name for name in expected)
    batch = BatchEncoder(processor, None, make_cache(tmp_path, model, processor, rows, num_layers=1))(rows)
    assert torch.equal(batch.input_ids, inputs["input_ids"])
    module = TrainingModule(model)
    loss = module(batch)["answer"] / batch.num_labels
    torch.testing.assert_close(loss, plain, rtol=2e-3, atol=1e-6)
    found = gradients(module, loss)
    assert set(found) == {f"model.{name}" for name in expected}
    for name, gradient in expected.items():  # the cache holds float16
        error = (found[f"model.{name}"] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 2e-2, name


def test_the_cache_holds_what_no_stage_trains() -> None:
    frozen = StageConfig({"projector": 1.0}, max_steps=1)
    last = StageConfig({"encoder": 1.0}, max_steps=1, encoder_last_layers=3)
    whole = StageConfig({"encoder": 1.0}, max_steps=1)
    assert cached_layers([frozen], 4) is None
    assert cached_layers([frozen, last], 4) == 1
    assert cached_layers([last, whole], 4) == 1
    assert cached_layers([frozen, whole], 4) is None
    assert [frozen_layers(stage, 4) for stage in (frozen, last, whole)] == [4, 1, 0]


def test_a_cache_of_the_first_layers_is_known_by_their_weights_alone(parts) -> None:
    _, processor, _ = parts
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.model.audio_tower.layers[1].fc1.weight += 1
    assert encoder_hash(model, processor, 1) == encoder_hash(other, processor, 1)
    assert encoder_hash(model, processor) != encoder_hash(other, processor)
    assert encoder_hash(model, processor, 1) != encoder_hash(model, processor)


def test_only_the_assistant_is_learnt(parts) -> None:
    """P9: the user's prompt once was learnt as well."""
    _, processor, rows = parts
    batch = BatchEncoder(processor)(rows[:1])
    labelled = batch.labels[0][batch.labels[0] != -100]
    answer = rows[0].messages[1]["content"][0]["text"]
    assert processor.decode(labelled) == answer + "<|im_end|>"


def test_a_rows_answer_counts_as_much_as_its_set_says(parts) -> None:
    folder, processor, rows = parts
    model = tiny_model()
    weights = [3.0, 1.0, 0.5, 1.0, 1.0]
    weighted = [replace(row, answer_weight=weight) for row, weight in zip(rows, weights, strict=True)]
    batch = BatchEncoder(processor)(weighted)
    logits = model(**plain_inputs(processor, rows)).logits[:, :-1]
    labels = batch.labels[:, 1:]
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )  # (B, S - 1)
    expected = (losses.sum(dim=1) * torch.tensor(weights)).sum()
    torch.testing.assert_close(TrainingModule(model)(batch)["answer"], expected)
    num_labels = ((labels != -100).sum(dim=1) * torch.tensor(weights)).sum()
    assert batch.num_labels == num_labels
    (row,) = read_dataset(
        DatasetConfig(str(write_dataset(folder / "weighted", 1)), answer_weight=4.0, max_rows=1)
    ).rows
    assert row.answer_weight == 4.0


@pytest.mark.parametrize("cached", [False, True])
def test_ctc_can_read_a_layer_of_the_language_model(parts, cached: bool) -> None:
    folder, processor, rows = parts
    model = tiny_model()
    model.requires_grad_(True)
    module = TrainingModule(model, uses_ctc=True)
    cache = make_cache(folder, model, processor, rows) if cached else None
    losses = module(BatchEncoder(processor, None, cache, uses_ctc=True)(rows), ctc_layer=1)
    inputs = plain_inputs(processor, rows)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    expected = 0.0
    for row, states, ids in zip(rows, hidden, inputs["input_ids"], strict=True):
        if row.transcript is not None:
            scores = F.log_softmax(module.ctc_head(states[ids == processor.audio_token_id]), -1)[:, None]
            target = torch.tensor([ctc_targets(row.transcript)])
            lengths = torch.tensor([len(scores)]), torch.tensor([target.shape[1]])
            expected += F.ctc_loss(scores, target, *lengths, reduction="sum", zero_infinity=True)
    torch.testing.assert_close(losses["ctc"], expected, rtol=1e-2, atol=1e-2)  # the cache holds float16
    found = gradients(module, losses["ctc"])
    assert any(".language_model.layers.0." in name for name in found)
    assert not any(".language_model.layers.1." in name for name in found)


def test_ctc_is_torchs_ctc_on_the_projected_rows(parts) -> None:
    folder, processor, rows = parts
    model = tiny_model()
    module = TrainingModule(model, uses_ctc=True)
    cache = make_cache(folder, model, processor, rows)
    batch = BatchEncoder(processor, None, cache, uses_ctc=True, uses_answers=False)(rows)
    assert batch.input_ids is None
    loss = module(batch, uses_answers=False)["ctc"]
    expected = 0.0
    for row in rows:
        if row.transcript is not None:
            projected = model.model.multi_modal_projector(
                torch.from_numpy(cache.get(row.audio[0]).copy()).float()
            )
            scores = F.log_softmax(module.ctc_head(projected), -1)[:, None]
            target = torch.tensor([ctc_targets(row.transcript)])
            lengths = (torch.tensor([len(scores)]), torch.tensor([target.shape[1]]))
            expected += F.ctc_loss(scores, target, *lengths, reduction="sum", zero_infinity=True)
    torch.testing.assert_close(loss, expected)
    assert loss > 0
    assert ctc_targets("Hi 5,  it's") == [8, 9, 28, 9, 20, 27, 19]
    full = BatchEncoder(processor, None, None, uses_ctc=True)(rows)
    torch.testing.assert_close(module(full)["ctc"], loss, rtol=1e-2, atol=1e-2)


def test_chance_comes_from_the_seed(parts) -> None:
    _, processor, rows = parts
    augmentation = AugmentationConfig(
        gain_probability=1, speed_probability=1, spec=SpecAugmentConfig(2, mel_masks=1)
    )
    encoder = BatchEncoder(processor, augmentation)
    first, again, other = (encoder(rows, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first.input_features, again.input_features)
    assert first.input_features.shape != other.input_features.shape or not torch.equal(
        first.input_features, other.input_features
    )


# What is trained


@pytest.mark.parametrize(
    ("rates", "options", "prefixes", "count"),
    [
        (["projector"], {}, ("model.multi_modal_projector.",), 4),
        (
            ["encoder", "projector"],
            {},
            ("model.audio_tower.", "model.multi_modal_projector."),
            4 + 2 * 15 + 4 + 2,
        ),
        (
            ["encoder"],
            {"encoder_last_layers": 1},
            ("model.audio_tower.layers.1.", "model.audio_tower.layer_norm."),
            17,
        ),
        (["language_model"], {}, ("model.language_model.", "lm_head."), 2 * 12 + 3),
    ],
)
def test_a_stage_trains_what_it_names(rates, options, prefixes, count) -> None:
    """P7; the position table is never trained."""
    model = tiny_model()
    stage = StageConfig(dict.fromkeys(rates, 1e-3), max_steps=1, **options)
    by_part = select_parameters(model, stage)
    names = [name for part in by_part.values() for name in part]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith(prefixes) for name in names)
    assert len(names) == count
    assert "model.audio_tower.embed_positions.weight" not in names
    optimizer = build_optimizer(TrainingModule(model), stage)
    assert {group["part"] for group in optimizer.param_groups} == set(rates)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == count
    assert all(
        (group["weight_decay"] > 0) == (group["params"][0].ndim >= 2) for group in optimizer.param_groups
    )


def test_lora_touches_the_language_model_only() -> None:
    """P7: q_proj, k_proj and v_proj exist in the encoder too."""
    pytest.importorskip("peft", reason="needs peft")
    model = tiny_model()
    add_lora(model, LoraSettings(rank=2))
    stage = StageConfig({"lora": 1e-3}, max_steps=1)
    names = select_parameters(model, stage)["lora"]
    assert len(names) == 2 * 7 * 2
    assert all(name.startswith("model.language_model.layers.") and ".lora_" in name for name in names)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    with pytest.raises(ConfigError, match="no 'fc1'"):
        add_lora(tiny_model(), LoraSettings(target_modules=["fc1"]))


def test_lora_touches_the_layers_that_are_named() -> None:
    pytest.importorskip("peft", reason="needs peft")
    model = tiny_model()
    add_lora(model, LoraSettings(rank=2, target_modules=["q_proj"], layers_to_transform=[1]))
    adapted = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    assert adapted == ["model.language_model.layers.1.self_attn.q_proj.lora_A.default.weight"]
    for left_out, named in (([0], [1]), ([], [0, 1])):
        model = tiny_model()
        model.config.extra[UNADAPTED_KEY] = left_out
        add_lora(model, LoraSettings(rank=2, target_modules=["q_proj"]))
        adapted = [name for name, _ in model.named_parameters() if ".lora_A" in name]
        assert [int(name.split(".")[3]) for name in adapted] == named
    model = tiny_model()
    model.config.extra[UNADAPTED_KEY] = 0.5
    with pytest.raises(ConfigError, match=r"unadapted_layers must be a list of layers, got 0\.5"):
        add_lora(model, LoraSettings())
    for layers in ([0, 2], [-1], []):
        with pytest.raises(ConfigError, match=r"must name some of the language model's layers, 0 to 1\."):
            add_lora(tiny_model(), LoraSettings(layers_to_transform=layers))


# The cache


def test_the_cache_holds_the_encoders_rows_in_variants_and_finds_them_again(parts, tmp_path: Path) -> None:
    _, processor, rows = parts
    model = tiny_model()
    augmentation = AugmentationConfig(speed_probability=1.0, speed=(0.8, 0.9))
    cache = make_cache(tmp_path, model, processor, rows, augmentation, augmented_copies=2, shard_clips=4)
    path = rows[0].audio[0]
    assert cache.variants == [0, 1, 2]
    features, mask = processor.feature_extractor.extract([load_audio(path)])
    with torch.no_grad():
        expected = model.model.audio_tower(features, mask).audio_tokens
    torch.testing.assert_close(
        torch.from_numpy(cache.get(path).copy()).float(), expected, atol=2e-3, rtol=2e-3
    )
    assert len(cache.get(path, 1)) > len(expected)  # slower is longer
    assert not np.array_equal(cache.get(path, 1), cache.get(path, 2))
    again = FeatureCache(cache.config, augmentation, encoder_hash(model, processor), 32)
    paths = [path for row in rows for path in row.audio]
    assert again.missing(paths) == []
    assert len(list(again.folder.glob("shard-*.bin"))) == 1 + (len(paths) * 3 > 16)
    other = FeatureCache(
        cache.config, AugmentationConfig(gain_probability=1.0), encoder_hash(model, processor), 32
    )
    assert len(other.missing(paths)) == 2 * len(paths)  # the clean ones are shared
    assert FeatureCache(cache.config, augmentation, encoder_hash(tiny_model(1), processor), 32).missing(paths)


# Augmentation

NOISE = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
TONE = np.sin(np.arange(16000) * 0.3).astype(np.float32) * 0.3


def test_noise_has_the_ratio_and_short_noise_repeats() -> None:
    mixed = mix_noise(TONE, NOISE, 10.0, np.random.default_rng(0))
    ratio = 10 * np.log10(np.mean(TONE**2) / np.mean((mixed - TONE) ** 2))
    assert ratio == pytest.approx(10.0, abs=0.1)
    assert np.array_equal(
        mix_noise(np.zeros(100, np.float32), NOISE, 10.0, np.random.default_rng(0)), np.zeros(100)
    )


def test_speed_band_and_reverb() -> None:
    assert len(change_speed(TONE, 1.1)) == pytest.approx(16000 / 1.1, abs=2)
    assert len(change_speed(TONE[:321], 1.1)) == 321  # shorter could not be encoded
    limited = limit_band(NOISE, 3000.0)
    spectrum = np.abs(np.fft.rfft(limited)) / np.abs(np.fft.rfft(NOISE)).mean()
    assert len(limited) == len(NOISE)
    assert spectrum[len(spectrum) // 2 :].mean() < 0.1 < spectrum[: len(spectrum) // 4].mean()
    wet = add_reverb(TONE, 0.3, np.random.default_rng(0))
    assert len(wet) == len(TONE)
    assert np.sum(wet**2) == pytest.approx(np.sum(TONE**2), rel=1e-3)
    assert np.abs(wet - TONE).max() > 1e-3


def test_nothing_drawn_changes_nothing_and_the_peak_is_kept() -> None:
    assert np.array_equal(augment_waveform(TONE, AugmentationConfig(), np.random.default_rng(0)), TONE)
    loud = AugmentationConfig(gain_probability=1.0, gain_db=(40.0, 40.0))
    assert np.abs(augment_waveform(TONE, loud, np.random.default_rng(0))).max() == pytest.approx(1.0)


def test_masks_stay_within_their_share() -> None:
    spec = SpecAugmentConfig(time_masks=5, max_time_s=10.0, mel_masks=2, max_mels=4, max_time_share=0.2)
    features = torch.randn(1, 128, 3000)
    before = features.clone()
    mask_features(features, [300], spec, np.random.default_rng(1))
    changed = (features != before)[0]
    assert not changed[:, 300:].any()
    assert 0 < changed.all(dim=0).sum() <= 60
    rows = np.ones((100, 8), np.float16)
    masked = mask_rows(rows, spec, np.random.default_rng(1))
    assert rows.all()
    assert 0 < (masked == 0).all(axis=1).sum() <= 20
