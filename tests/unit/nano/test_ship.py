"""What is shipped of several checkpoints of the built-in model: their mean, in part in float8."""

from __future__ import annotations

import pytest
import torch

from audioflamingo.checkpoint.weights import WEIGHTS_FILE
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from recipes.nano.nano_model.layout import QUOTE, START, STATE, WIDTH
from recipes.nano.ship_model import (
    check_float16,
    in_float8_at_length,
    load_mean,
    make_fit_float8,
    round_to_float8,
    round_what_is_found,
    scale_stream,
)
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


def test_what_float16_cannot_hold_is_not_shipped():
    model, inputs = tiny_model().half(), make_batch([([300], 5)])
    check_float16(model, [inputs])
    with torch.no_grad():
        model.model.language_model.layers[-1].mlp.up_proj.weight.fill_(6e4)
        model.model.language_model.layers[-1].mlp.gate_proj.weight.fill_(6e4)
    with pytest.raises(SystemExit, match="not finite"):
        check_float16(model, [inputs])


def test_an_embedding_keeps_its_length_in_float8():
    """Plain rounding takes up to a percent off."""
    torch.manual_seed(0)
    for size in (0.05, 0.3, 3.0):
        row = size * torch.randn(416)
        rounded = in_float8_at_length(row)
        assert torch.equal(rounded, rounded.to(torch.float8_e4m3fn).float())
        assert float(rounded.norm()) == pytest.approx(float(row.norm()), rel=1e-5)
        assert (rounded - row).abs().max() < 0.13 * row.abs().max()
        assert torch.nn.functional.cosine_similarity(rounded, row, 0) > 0.998


def test_only_what_is_found_by_a_flag_is_rounded_at_its_length():
    model = tiny_model()
    model.model.language_model.embed_tokens = torch.nn.Embedding(3, WIDTH)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[:, STATE:] = 0
        embeddings[1, START] = embeddings[2, QUOTE] = 0.5
    before = embeddings.detach().clone()
    round_what_is_found(model)
    assert torch.equal(embeddings[0], before[0])
    for token in (1, 2):
        assert torch.equal(embeddings[token], in_float8_at_length(before[token]))


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
        model.half().save_pretrained(tmp_path)
        large = (tmp_path / WEIGHTS_FILE).stat().st_size
        round_to_float8(model)
        model.save_pretrained(tmp_path)
        matrices = [model.lm_head.weight, model.get_input_embeddings().weight]
        for layer in model.model.language_model.layers[1:]:
            matrices += [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
        saved_bytes = sum(matrix.numel() for matrix in matrices)
        assert large - (tmp_path / WEIGHTS_FILE).stat().st_size == pytest.approx(saved_bytes, abs=200)
        after = AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path, dtype="float32")(
            **inputs
        ).logits
    assert 0 < (after - before).norm() < 0.1 * before.norm()


def test_what_float8_cannot_hold_is_not_rounded():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1000
    with pytest.raises(SystemExit, match="lm_head"):
        round_to_float8(model)
