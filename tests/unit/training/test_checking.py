"""`af3 train --check`: what it counts, estimates and shows, without training or writing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from audioflamingo.errors import DataError
from audioflamingo.processor import AutoProcessor
from tests.support.cli_runs import af3
from tests.support.tiny_training import config_values, write_model

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("peft", reason="needs peft")

from audioflamingo.checkpoint.pretrained import read_config
from audioflamingo.datasets.conversations import read_dataset
from audioflamingo.training.batches import BatchEncoder
from audioflamingo.training.checking import check_training
from audioflamingo.training.estimate import empty_model, estimate_memory
from audioflamingo.training.settings import build
from audioflamingo.training.training_config import TrainingConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    config_values(folder)
    return folder


def test_counts_are_those_of_the_batches_and_nothing_is_written(base: Path) -> None:
    config = build(TrainingConfig, config_values(base))
    check = check_training(config)
    (dataset,) = check.datasets
    batch = BatchEncoder(AutoProcessor.from_pretrained(base / "model"))(dataset.rows)
    is_audio = batch.input_ids == read_config(base / "model").audio_token_id
    assert check.num_labels == batch.num_labels
    assert check.num_text_tokens == int(batch.attention_mask.sum()) - int(is_audio.sum())
    assert abs(check.num_audio_tokens - int(is_audio.sum())) <= len(dataset.rows)  # by stated length
    assert check.stages[0].num_steps == 6
    assert check.stages[0].seconds > 0
    assert not (base / "run").exists()


def test_a_row_is_shown_as_the_model_sees_it(base: Path) -> None:
    check = check_training(build(TrainingConfig, config_values(base)))
    rows = read_dataset(build(TrainingConfig, config_values(base)).data.train[0]).rows
    answer = rows[0].messages[1]["content"][0]["text"]
    assert len(check.rows) == 3
    assert f"«{answer}<|im_end|>" in check.rows[0]
    assert "user\n" in check.rows[0].split("«")[0]
    assert "<sound>" in check.rows[0]
    assert check.rows[0] in str(check)


def test_memory_of_what_is_trained(base: Path) -> None:
    """By hand for LoRA on int4: 4 bytes of gradient and 8 (or 2) of state for each weight of the adapter."""
    write_model(base / "wide", hidden_size=64)
    values = config_values(base, model=str(base / "wide"), quantization="int4", lora={"rank": 4})
    values["stages"] = [{"learning_rates": {"lora": 1e-3}, "max_steps": 3}]
    config = build(TrainingConfig, values)
    model = empty_model(config, read_config(base / "wide"))
    memory = estimate_memory(config, model, config.stages[0], "float32")
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    num_trained = 2 * sum(4 * (a + b) for a, b in widths)
    assert memory["gradients"] == 4 * num_trained
    assert memory["optimizer"] == 8 * num_trained
    assert model.model.language_model.layers[0].mlp.up_proj.base_layer.packed.numel() < 0.7 * 64 * 96
    eight = build(TrainingConfig, {**values, "optimizer": "adamw_8bit"})
    assert estimate_memory(eight, model, config.stages[0], "float32")["optimizer"] == 2 * num_trained
    recomputed = build(TrainingConfig, {**values, "gradient_checkpointing": True})
    assert (
        estimate_memory(recomputed, model, config.stages[0], "float32")["activations"] < memory["activations"]
    )


def test_the_published_model_fits_in_12_gb_with_lora_on_int4(base: Path) -> None:
    from audioflamingo.config import AudioFlamingo3Config

    values = config_values(base, quantization="int4", weights_dtype="bfloat16", gradient_checkpointing=True)
    values["stages"] = [{"learning_rates": {"lora": 1e-4}, "max_steps": 3}]
    values["batch"] = {"max_tokens": 1500, "max_rows": 4}
    config = build(TrainingConfig, values)
    with torch.device("meta"):
        memory = estimate_memory(
            config, empty_model(config, AudioFlamingo3Config()), config.stages[0], "bfloat16"
        )
    assert 5e9 < memory["weights"] < 6e9
    assert sum(memory.values()) < 12e9


def test_the_command_prints_it_and_stops_at_bad_data(base: Path) -> None:
    file = base / "check.json"
    file.write_text(json.dumps(config_values(base)), encoding="utf-8")
    result = af3("train", file, "--check")
    assert result.exit_code == 0, result.output
    printed = result.output
    assert "data: 12 rows" in printed
    assert "6 steps" in printed
    values = config_values(base)
    values["data"]["train"] = [{"path": str(base / "nowhere.jsonl")}]
    with pytest.raises(DataError, match="cannot read"):
        check_training(build(TrainingConfig, values))
