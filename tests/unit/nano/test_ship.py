"""What is shipped of several checkpoints of the built-in model: their mean, in part in float8."""

from __future__ import annotations

import pytest
import torch

from audioflamingo.checkpoint.weights import WEIGHTS_FILE
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from recipes.nano.ship_model import load_mean, make_fit_float8, scale_stream, store_in_float8
from tests.support.tiny_model import make_batch, tiny_model


def test_the_weights_of_several_checkpoints_are_averaged(tmp_path):
    models = [tiny_model(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    mean = load_mean([tmp_path / str(number) for number in range(3)])
    parameters = [model.parameters() for model in (mean, *models)]
    for averaged, *weights in zip(*parameters, strict=True):
        torch.testing.assert_close(averaged, torch.stack(weights).mean(0))


def test_a_larger_stream_changes_no_answer(tmp_path):
    model, inputs = tiny_model(), make_batch([([300], 5)])
    with torch.no_grad():
        before = model(**inputs).logits
        scale_stream(model, 12.5)
        model.save_pretrained(tmp_path)
        after = AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_large_columns_of_the_output_layer_go_into_the_norm_so_that_float8_holds_them(tmp_path):
    """The logits stay; stored in float8 they move by its rounding."""
    model, inputs = tiny_model(), make_batch([([300], 5)])
    with torch.no_grad():
        model.lm_head.weight[:, 3] *= 20_000
        model.model.language_model.norm.weight[3] /= 20_000
        before = model(**inputs).logits
        make_fit_float8(model)
        assert model.lm_head.weight.abs().max() <= 448
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        large = (tmp_path / WEIGHTS_FILE).stat().st_size
        store_in_float8(tmp_path / WEIGHTS_FILE)
        matrices = [model.lm_head.weight, model.get_input_embeddings().weight]
        for layer in model.model.language_model.layers[1:]:
            matrices += [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
        saved_bytes = 3 * sum(matrix.numel() for matrix in matrices)
        assert large - (tmp_path / WEIGHTS_FILE).stat().st_size == pytest.approx(saved_bytes, abs=200)
        after = AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path, dtype="float32")(
            **inputs
        ).logits
    assert 0 < (after - before).norm() < 0.1 * before.norm()


def test_what_float8_cannot_hold_is_not_stored(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1000
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="lm_head"):
        store_in_float8(tmp_path / WEIGHTS_FILE)
