"""Music Flamingo in training: time is heard from windows and from the cache alike; LoRA gives adapters that load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audioflamingo import (
    AutoModelForConditionalGeneration,
    AutoProcessor,
    MusicFlamingoForConditionalGeneration,
)
from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.datasets.dataset_config import DatasetConfig
from audioflamingo.training.batches import BatchEncoder
from audioflamingo.training.feature_cache import FeatureCache, encoder_hash
from audioflamingo.training.module import TrainingModule
from audioflamingo.training.settings import build
from audioflamingo.training.training_config import AugmentationConfig, FeatureCacheConfig, TrainingConfig
from tests.support.tiny_family import make_music_batch, tiny_music_model, write_music_processor
from tests.support.tiny_training import config_values, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("music")
    tiny_music_model().save_pretrained(folder / "model")
    write_music_processor(folder / "model")
    write_dataset(folder / "data", 4, extra_s=31.0)
    write_dataset(folder / "data", 3, "valid.jsonl", seed=1)
    return folder


@torch.no_grad()
def test_windows_and_cached_rows_give_one_loss(folder: Path) -> None:
    model, processor = tiny_music_model(), AutoProcessor.from_pretrained(folder / "model")
    rows = read_dataset(DatasetConfig(str(folder / "data" / "train.jsonl"))).rows
    module = TrainingModule(model, uses_ctc=True)
    inputs = processor.apply_chat_template(
        [row.messages for row in rows],
        tokenize=True,
        return_dict=True,
        output_labels="assistant",
        padding_side="right",
    )
    expected = model(**inputs).loss
    found = []
    for num_layers in ("no cache", None, 1):
        cache = None
        if num_layers != "no cache":
            config = FeatureCacheConfig(str(folder / f"cache-{num_layers}"))
            cache = FeatureCache(
                config, AugmentationConfig(), encoder_hash(model, processor, num_layers), 32, num_layers
            )
            cache.build(cache.missing([path for row in rows for path in row.audio]), model, processor)
        batch = BatchEncoder(processor, None, cache, uses_ctc=True)(rows)
        losses = module(batch)
        found.append((losses["answer"] / batch.num_labels, losses["ctc"]))
        only_ctc = BatchEncoder(processor, None, cache, uses_ctc=True, uses_answers=cache is None)(rows)
        torch.testing.assert_close(
            module(only_ctc, uses_answers=False)["ctc"], losses["ctc"], rtol=1e-4, atol=1e-4
        )
    for answer, ctc in found:  # the cache holds float16
        torch.testing.assert_close(answer, expected, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(ctc, found[0][1], rtol=1e-2, atol=1e-2)


def test_a_lora_run_gives_an_adapter_that_loads(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("peft", reason="needs peft")
    from audioflamingo.training import train

    values = config_values(folder, lora={"rank": 4, "alpha": 8, "merge": True})
    values["stages"] = [{"learning_rates": {"lora": 1e-2}, "max_steps": 3}]
    result = train(build(TrainingConfig, values), show_progress=False)
    merged = AutoModelForConditionalGeneration.from_pretrained(result.last_dir)
    assert type(merged) is MusicFlamingoForConditionalGeneration
    adapted = AutoModelForConditionalGeneration.from_pretrained(folder / "model")
    adapted.load_adapter(result.last_dir / "adapter", "tuned")
    batch = make_music_batch([([[3000, 300]], 6)])
    with torch.no_grad():
        base = adapted(**batch).logits
        with adapted.use_adapter("tuned"):
            got = adapted(**batch).logits
        torch.testing.assert_close(got, merged(**batch).logits, atol=1e-3, rtol=1e-3)
    assert not torch.equal(got, base)
