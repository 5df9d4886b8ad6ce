"""Quantizing a model in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import audioflamingo
from audioflamingo.errors import ArgumentError
from audioflamingo.quantization import (
    QuantizationConfig,
    QuantizedEmbedding,
    QuantizedLinear,
    num_parameters,
    read_quantization,
)
from audioflamingo.quantization.calibration import NUM_TOKENS, measure_inputs
from audioflamingo.quantization.quantize_model import FLOAT_KEY, packed_layers
from audioflamingo.quantization.schemes import as_config
from tests.support.generation_models import lively_model
from tests.support.tiny_model import make_batch, tiny_model

SCHEMES = ["int8", "int4", "fp8"]


def small_model(seed: int = 0, **changes: Any) -> Any:
    """The tiny model with a width that groups divide."""
    return tiny_model(seed, **{"hidden_size": 64, **changes})


def batch() -> dict[str, Tensor]:
    return make_batch([([300], 5), ([40], 9), ([], 4)])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    inputs = batch()
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.04), ("int4", 0.25), ("fp8", 0.1)])
def test_answers_stay_near(scheme: str, limit: float) -> None:
    model = small_model()
    expected = logits(model)
    assert audioflamingo.quantize(model, scheme) is model
    assert 0 < relative_error(logits(model), expected) < limit


def test_all_linear_layers_and_the_embeddings_are_quantized() -> None:
    model = audioflamingo.quantize(small_model(), "int4")
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    layers = packed_layers(model)
    groups = {name: layer.format.group for name, layer in layers.items()}
    text = {name for name in layers if name.startswith("model.language_model.layers.")}
    assert len(text) == 2 * 7
    assert {name for name, group in groups.items() if group is None} == layers.keys() - text
    assert groups["model.language_model.layers.0.self_attn.q_proj"] == 64
    assert groups["model.language_model.layers.1.mlp.down_proj"] == 32  # of 96 inputs
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.model.audio_tower.layers[0].fc1, QuantizedLinear)
    assert isinstance(model.model.multi_modal_projector.linear_2, QuantizedLinear)
    assert isinstance(model.model.audio_tower.embed_positions, nn.Embedding)


def test_float8_is_for_layers_whose_errors_are_damped() -> None:
    model = audioflamingo.quantize(small_model(), "fp8")
    others = {name for name, layer in packed_layers(model).items() if not layer.format.is_float}
    assert others == {"lm_head", "model.language_model.embed_tokens"}
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_a_folders_config_may_keep_modules_as_they_are(tmp_path: Path) -> None:
    model = small_model()
    model.config.extra[FLOAT_KEY] = ["model.language_model.layers.0."]
    audioflamingo.quantize(model, "int4")
    names = packed_layers(model).keys()
    assert "model.language_model.layers.1.mlp.up_proj" in names
    assert not any(name.startswith("model.language_model.layers.0.") for name in names)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert packed_layers(loaded).keys() == names
    assert torch.equal(logits(loaded), logits(model))


def test_the_published_models_sizes_take_the_default_group() -> None:
    config = QuantizationConfig("int4")
    for width in (384, 768, 1024, 1536, 3584, 18944):
        layer = nn.Linear(width, 1, device="meta")
        format_ = config.layer_format("model.language_model.layers.0.x", layer)
        assert format_ is not None
        assert format_.group == config.group_size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_layer_in_four_bits_is_chosen_apart(scheme: str) -> None:
    group_size = 64 if scheme == "int4" else None
    model = small_model(intermediate_size=128)
    expected = model.lm_head.weight.detach().clone()
    audioflamingo.quantize(model, scheme, group_size=group_size, output_bits=4)
    assert (model.lm_head.format.bits, model.lm_head.format.group) == (4, 32)
    assert 0.01 < relative_error(model.lm_head.dequantize(), expected) < 0.15
    others = {layer.format.bits for name, layer in packed_layers(model).items() if name != "lm_head"}
    assert others == ({4, 8} if scheme == "int4" else {8})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_answer_does_not_depend_on_its_batch(scheme: str) -> None:
    """In float32, where only attention may round differently beside other rows."""
    model = audioflamingo.quantize(lively_model(hidden_size=64), scheme)
    inputs = batch()
    options: dict[str, Any] = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**inputs, **options)
    answers = together.sequences[:, inputs["input_ids"].shape[1] :]
    assert len({tuple(row) for row in answers.tolist()}) == 3
    for row in range(3):
        alone = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        if row < 2:
            alone |= {n: inputs[n][row : row + 1] for n in ("input_features", "input_features_mask")}
        output = model.generate(**alone, **options)
        assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], answers[row : row + 1])
        for ours, theirs in zip(output.logits, together.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[row], rtol=2e-2, atol=2e-2)


def test_numbers_about_the_model_are_true() -> None:
    model = small_model()
    parameters, footprint = num_parameters(model), model.get_memory_footprint()
    assert footprint == 4 * parameters
    config = model.config
    audioflamingo.quantize(model, "int4")
    assert num_parameters(model) == parameters
    stored = sum(layer.packed.nbytes + layer.scales.nbytes for layer in packed_layers(model).values())
    rest = 4 * sum(p.numel() for p in model.parameters())
    assert model.get_memory_footprint() == stored + rest < footprint / 2
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert read_quantization(model.config) == QuantizationConfig("int4")
    assert read_quantization(config) is None  # it may be another model's too


def test_other_dtypes() -> None:
    model = audioflamingo.quantize(small_model(), "int8")
    expected = logits(model)
    for dtype, limit in ((torch.bfloat16, 0.05), (torch.float16, 0.05), (torch.float32, 0.02)):
        model.to(dtype)
        found = logits(model)
        assert model.dtype == found.dtype == dtype
        assert relative_error(found.float(), expected) < limit


def test_copies_are_independent() -> None:
    model = audioflamingo.quantize(small_model(), "int8")
    expected = logits(model)
    copied = copy.deepcopy(model)
    copied.lm_head.packed.zero_()
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(copied), expected)


def test_weights_that_are_tied_are_quantized_one_by_one() -> None:
    model = small_model()
    model.lm_head.weight = model.get_input_embeddings().weight
    expected = logits(model)
    audioflamingo.quantize(model, "int8")
    assert torch.equal(model.lm_head.dequantize(), model.get_input_embeddings().dequantize())
    assert relative_error(logits(model), expected) < 0.04


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int3", {}, r"'int3' does not exist; choose from \('int8', 'int4', 'fp8'\)"),
        ("int8", {"group_size": 64}, "belongs to 'int4'"),
        ("fp8", {"group_size": 64}, "'fp8' has one scale a channel"),
        ("fp8", {"calibration": [{}]}, "'fp8' rounds each weight by itself"),
        ("int4", {"group_size": 48}, r"group_size must be one of \(32, 64, 128\), got 48"),
        (
            "int4",
            {"group_size": 64},
            r"64 does not divide the 96 inputs of .*layers\.0\.mlp\.down_proj; 32 would",
        ),
        ("int8", {"output_bits": 6}, r"output_bits must be one of \(8, 4\), got 6"),
        ("int8", {"calibration": []}, "no prompts"),
        (8, {}, "must be one of"),
        (QuantizationConfig("int8", is_calibrated=True), {}, "'int8, calibrated' needs prompts"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(scheme: Any, options: Any, message: str) -> None:
    model = small_model()
    with pytest.raises(ArgumentError, match=message):
        audioflamingo.quantize(model, scheme, **options)
    assert packed_layers(model) == {}
    assert read_quantization(model.config) is None


def test_inputs_that_no_group_divides_are_refused() -> None:
    model = small_model(hidden_size=48)
    with pytest.raises(ArgumentError, match=r"self_attn\.q_proj has 48 inputs, which no group of 32 to 64"):
        audioflamingo.quantize(model, "int4")
    audioflamingo.quantize(model, "int8")


def test_a_group_size_that_was_asked_for_is_used() -> None:
    model = audioflamingo.quantize(small_model(intermediate_size=128), "int4", group_size=32)
    groups = {layer.format.group for layer in packed_layers(model).values()}
    assert groups == {None, 32}


def test_twice_is_refused() -> None:
    model = audioflamingo.quantize(small_model(), "int8")
    with pytest.raises(ArgumentError, match=r"quantized already \(int8\)"):
        audioflamingo.quantize(model, "int4")


def test_training_is_refused() -> None:
    model = audioflamingo.quantize(small_model(), "int8")
    inputs = make_batch([([40], 9)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 500, -100)
    assert not model.train()(**inputs, labels=labels).loss.requires_grad
    model.requires_grad_(True)
    with pytest.raises(ArgumentError, match="cannot be trained"):
        model(**inputs, labels=labels)


def test_adapters_go_under_no_quantized_layer_and_no_quantization_over_adapters() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj")
    model = small_model()
    adapted = peft.get_peft_model(model, lora)
    with pytest.raises(ArgumentError, match="merge_and_unload"):
        audioflamingo.quantize(model, "int8")
    merged = adapted.merge_and_unload()
    expected = logits(merged)
    assert relative_error(logits(audioflamingo.quantize(merged, "int8")), expected) < 0.04
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(merged, lora)


# Calibration


def test_what_is_measured_of_a_layers_inputs() -> None:
    model = small_model()
    model.generation_config.eos_token_id = None
    seen: list[Tensor] = []
    projector = model.model.multi_modal_projector.linear_1
    handle = projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    prompts = [make_batch([([300], 5)]), make_batch([([40, 700], 9)], seed=1)]
    measured = measure_inputs(model, prompts)
    handle.remove()
    tokens = torch.cat(seen)
    inputs = measured["model.multi_modal_projector.linear_1"]
    mean = tokens.square().mean(dim=0)
    torch.testing.assert_close(inputs.mean_squares, mean + 0.01 * mean.mean())
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert measured.keys() == linear
    assert torch.equal(inputs.largest, tokens.abs().amax(dim=0))
    stride = len(tokens) // NUM_TOKENS
    assert stride == 8
    assert torch.equal(inputs.tokens, tokens[::stride].bfloat16())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("scheme", "gain"), [("int8", 0.7), ("int4", 0.85)])
def test_calibration_takes_care_of_inputs_that_stand_out(scheme: str, gain: float) -> None:
    """Some columns of the activations are far larger than the others, as in trained models."""
    prompts = [make_batch([([300], 5), ([40], 9), ([], 4)], seed=5)]  # others than those that are compared
    errors = torch.zeros(2)
    for seed in range(3):
        for column, calibration in enumerate((None, prompts)):
            model = small_model(seed)
            for layer in model.model.language_model.layers:
                layer.input_layernorm.weight.data[::16] *= 20
                layer.post_attention_layernorm.weight.data[::16] *= 20
            expected = logits(model)
            audioflamingo.quantize(model, scheme, calibration=calibration)
            errors[column] += relative_error(logits(model), expected)
    assert errors[1] < gain * errors[0]
    assert str(read_quantization(model.config)).endswith(", calibrated")


def test_what_is_asked_beside_a_config_holds() -> None:
    config = as_config(QuantizationConfig("int4", 32), output_bits=4)
    assert config == QuantizationConfig("int4", 32, output_bits=4)
    assert as_config(config) == config
    assert as_config(config, group_size=64, is_calibrated=True) == QuantizationConfig("int4", 64, True, 4)
