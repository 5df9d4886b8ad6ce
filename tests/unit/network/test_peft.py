"""LoRA through `peft`: what it trains, and that an adapter that is off leaves no trace (P6, P7, P8)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny_model import make_batch, tiny_model

peft = pytest.importorskip("peft", reason="needs peft")

LANGUAGE_MODEL_PROJECTIONS = r".*language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"


def lora_config(**changes):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_MODEL_PROJECTIONS} | changes
    )


def batch_with_labels():
    batch = make_batch([([300], 6), ([50], 9)], "right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_only_the_language_models_adapters_train(task_type) -> None:
    """P7: q_proj, k_proj and v_proj exist in the encoder too."""
    model = peft.get_peft_model(tiny_model(), lora_config(task_type=task_type))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all(".language_model.layers." in name and "lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = batch_with_labels()
    first = model(**batch).loss
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(**batch).loss < first
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained)


@torch.no_grad()
def test_adapter_off_equals_the_fresh_model_and_on_does_not(tmp_path: Path) -> None:
    """P6, P8: an adapter once did nothing, and once changed the base in place."""
    batch = make_batch([([300], 6)])
    fresh = tiny_model()(**batch).logits
    model = peft.get_peft_model(tiny_model(), lora_config(init_lora_weights=False))
    adapted = model(**batch).logits
    assert (adapted - fresh).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, fresh)

    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(reloaded(**batch).logits, adapted)
    torch.testing.assert_close(reloaded.merge_and_unload()(**batch).logits, adapted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_adapter_trained_on_transformers_fits(tmp_path: Path) -> None:
    """Module names are those of transformers, so its adapters load, every key of them."""
    from tests.support.tiny_model import tiny_reference

    theirs = peft.get_peft_model(tiny_reference(), lora_config(init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    batch = make_batch([([300], 6)])
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-4, rtol=0)


@torch.no_grad()
def test_generate_runs_through_the_adapter() -> None:
    model = peft.get_peft_model(tiny_model(), lora_config(init_lora_weights=False, lora_alpha=400))
    batch = make_batch([([300], 6)])
    with_adapter = model.generate(**batch, max_new_tokens=8)
    with model.disable_adapter():
        without = model.generate(**batch, max_new_tokens=8)
    assert torch.equal(without, tiny_model().generate(**batch, max_new_tokens=8))
    assert not torch.equal(with_adapter, without)
