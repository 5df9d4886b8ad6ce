"""Encoder, projector, logits, loss and gradients beside transformers', on the same weights and inputs.

Tolerances are those that the project promises; what is measured is about a hundred times less.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch, tiny_model, tiny_reference, tokens_of

# 0.03, 0.05, 0.5, 7.3, 29.99, 30.0, 30.005, 30.01, 30.03, 59.99 and 65.2 s as frames of their windows.
WINDOWS = {
    "0.03": [3],
    "0.05": [5],
    "0.5": [50],
    "7.3": [730],
    "29.99": [2999],
    "30.0": [3000],
    "30.005": [3000, 1],
    "30.01": [3000, 1],
    "30.03": [3000, 3],
    "59.99": [3000, 2999],
    "65.2": [3000, 3000, 520],
}


@pytest.fixture(scope="module")
def models():
    return tiny_model(), tiny_reference()


def labels_of(batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return labels.masked_fill(labels == AUDIO_TOKEN_ID, -100)


def assert_same(ours, theirs, mask, atol):
    torch.testing.assert_close(ours[mask], theirs[mask], atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("seconds", WINDOWS)
def test_every_stage_at_every_length(models, seconds) -> None:
    """P11, P12, P13: a wrong activation, pooling or count shows at its own stage."""
    ours, theirs = models
    batch = make_batch([(WINDOWS[seconds], 6)], seed=len(seconds))
    features, mask = batch["input_features"], batch["input_features_mask"]
    got, expected = ours.get_audio_features(features, mask), theirs.get_audio_features(features, mask)
    for window, frames in enumerate(WINDOWS[seconds]):
        count = tokens_of(frames)
        torch.testing.assert_close(
            got.last_hidden_state[window, :count],
            expected.last_hidden_state[window, :count],
            atol=1e-4,
            rtol=0,
        )
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=2e-3, rtol=0)


@torch.no_grad()
def test_ten_minutes(models) -> None:
    """599.9 s: twenty windows, the last one not full; only the last logits are formed."""
    ours, theirs = models
    batch = make_batch([([3000] * 19 + [2990], 8)])
    got, expected = ours(**batch, logits_to_keep=5), theirs(**batch, logits_to_keep=5)
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-3, rtol=0)
    torch.testing.assert_close(got.audio_hidden_states, expected.audio_hidden_states, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batches_of_mixed_lengths(models, padding_side) -> None:
    ours, theirs = models
    batch = make_batch([([50], 5), ([3000, 100], 9), ([3], 30), ([730], 2)], padding_side)
    mask = batch["attention_mask"].bool()
    got = ours(**batch, output_hidden_states=True)
    expected = theirs(**batch, output_hidden_states=True)
    assert_same(got.logits, expected.logits, mask, 2e-3)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_same(a, b, mask, 1e-4)


@torch.no_grad()
def test_attention_weights(models) -> None:
    ours, theirs = tiny_model(), tiny_reference()
    ours.set_attn_implementation("eager")
    theirs.set_attn_implementation("eager")
    batch = make_batch([([50], 5), ([200], 9)])
    got, expected = ours(**batch, output_attentions=True), theirs(**batch, output_attentions=True)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        for row, mask in enumerate(batch["attention_mask"].bool()):
            torch.testing.assert_close(a[row][:, mask], b[row][:, mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_and_gradients(padding_side) -> None:
    ours, theirs = tiny_model().train(), tiny_reference().train()
    batch = make_batch([([50], 9), ([3000, 3], 12), ([400], 40)], padding_side)
    labels = labels_of(batch)
    got, expected = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-4, rtol=0)
    assert_same(got.logits, expected.logits, batch["attention_mask"].bool(), 2e-3)
    got.loss.backward()
    expected.loss.backward()
    reference = dict(theirs.named_parameters())
    assert set(reference) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        if reference[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, reference[name].grad, atol=1e-4, rtol=0, msg=name)


@torch.no_grad()
def test_cached_decoding(models) -> None:
    ours, theirs = models
    batch = make_batch([([300], 6), ([50], 9)])
    got = ours(**batch, use_cache=True)
    expected = theirs(**batch, use_cache=True)
    mask = batch["attention_mask"]
    for token in (7, 8, 9):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        step = {"input_ids": torch.full((2, 1), token), "attention_mask": mask}
        got = ours(**step, past_key_values=got.past_key_values)
        expected = theirs(**step, past_key_values=expected.past_key_values, use_cache=True)
        torch.testing.assert_close(got.logits, expected.logits, atol=2e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_the_reference(models, dtype) -> None:
    """Both round differently, so each is held against float32: ours may err at most a half more."""
    batch = make_batch([([700], 20), ([90], 15)])
    mask = batch["attention_mask"].bool()
    exact = models[1](**batch).logits[mask]
    got = tiny_model().to(dtype)(**batch).logits[mask].float()
    halved = batch | {"input_features": batch["input_features"].to(dtype)}
    expected = tiny_reference().to(dtype)(**halved).logits[mask].float()
    error, reference_error = (got - exact).square().mean().sqrt(), (expected - exact).square().mean().sqrt()
    assert error <= 1.5 * reference_error


@torch.no_grad()
def test_published_width() -> None:
    """One layer of each kind at Audio Flamingo 3's real width: head counts and widths that small models hide."""
    import transformers

    from audioflamingo.config import AudioFlamingo3Config
    from audioflamingo.model import AudioFlamingo3ForConditionalGeneration

    values = {
        "audio_config": {"model_type": "audioflamingo3_encoder", "num_hidden_layers": 1},
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 1000,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 1,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "audio_token_id": AUDIO_TOKEN_ID,
    }
    torch.manual_seed(0)
    theirs = transformers.AudioFlamingo3ForConditionalGeneration(
        transformers.AudioFlamingo3Config(**values)
    ).eval()
    with torch.device("meta"):
        ours = AudioFlamingo3ForConditionalGeneration(AudioFlamingo3Config.from_dict(values)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    batch = make_batch([([40], 6), ([110], 9)])
    got, expected = ours(**batch), theirs(**batch)
    torch.testing.assert_close(got.audio_hidden_states, expected.audio_hidden_states, atol=1e-4, rtol=0)
    assert_same(got.logits, expected.logits, batch["attention_mask"].bool(), 2e-3)
