"""transformers' own Trainer runs the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audioflamingo.errors import ArgumentError
from tests.support.tiny_model import make_batch, tiny_model

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")


def rows() -> list[dict[str, torch.Tensor]]:
    """Batches of one row, with labels."""
    batches = [make_batch([([300], 6 + 2 * number)], "right", seed=number) for number in range(4)]
    return [{**batch, "labels": batch["input_ids"].clone()} for batch in batches]


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_trainer_accumulates_and_learns(tmp_path: Path, has_checkpointing: bool) -> None:
    """It passed num_items_in_batch, and arguments for gradient checkpointing, which were refused."""
    model, data = tiny_model(), rows()
    with torch.no_grad():
        expected = [model(**row).loss.item() for row in data]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=has_checkpointing,
        max_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=lambda rows: rows[0])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert any(losses[0] == pytest.approx((a + b) / 2, abs=2e-3) for a in expected for b in expected)
    assert losses[2] + losses[3] < losses[0] + losses[1]


def test_losses_over_the_labels_of_a_whole_step() -> None:
    model, (first, second, *_) = tiny_model(), rows()
    counts = [row["labels"].shape[1] - 1 for row in (first, second)]
    with torch.no_grad():
        parts = [model(**row, num_items_in_batch=sum(counts)).loss for row in (first, second)]
        means = [model(**row).loss for row in (first, second)]
    torch.testing.assert_close(
        sum(parts), (means[0] * counts[0] + means[1] * counts[1]) / sum(counts), rtol=1e-5, atol=1e-6
    )


def test_another_way_of_checkpointing_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ArgumentError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ArgumentError, match="offload=True"):
        model.gradient_checkpointing_enable(offload=True)
