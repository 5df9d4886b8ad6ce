"""What a run will take, before it runs: bytes from the shapes of the model, hours from a measured matrix product.

Rough on purpose. Memory follows what the network keeps for its backward pass; `benchmarks/training_memory.py` holds it
against a process. Time is good to a factor of about two.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audioflamingo.audio.loading import N_FRAMES, conv_length
from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.config import AUDIO_TOKENS_PER_S, CHUNK_LENGTH_S, AudioFlamingo3Config
from audioflamingo.model import model_class_of
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.loss import LOSS_CHUNK
from audioflamingo.quantization.quantize_model import num_parameters
from audioflamingo.quantization.schemes import as_config, read_quantization, with_quantization
from audioflamingo.training.parts import add_lora, part_of, select_parameters
from audioflamingo.training.training_config import BatchConfig, StageConfig, TrainingConfig

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # of a trained float32 weight
UTILIZATION = 0.5  # of the speed of a large matrix product
_PRODUCT = 1024  # its size
_HIDDEN_KEPT, _INNER_KEPT = 12, 5  # values a token and layer keeps, in hidden and in intermediate widths
_ENCODER_WIDTHS = 8  # values of hidden and of inner width that a position of the encoder takes while it runs


def empty_model(config: TrainingConfig, model_config: AudioFlamingo3Config) -> Any:
    """The model of a run on the meta device, quantized and with adapters as in the run."""
    if config.quantization is not None and read_quantization(model_config) is None:
        model_config = with_quantization(model_config, as_config(config.quantization))
    model = build_empty(model_class_of(model_config), model_config)
    model.to(getattr(torch, config.weights_dtype))
    if config.uses_lora:
        add_lora(model, config.lora)
    return model


def estimate_memory(
    config: TrainingConfig, model: AudioFlamingo3WithHead, stage: StageConfig, precision: str
) -> dict[str, int]:
    """Bytes at the peak of a step of a stage.

    Args:
        config: of the run.
        model: from `empty_model`; which of its parameters ask for gradients changes.
        stage: of the run.
        precision: of the forward pass, as it is resolved.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations` (kept for the backward pass, or computed anew layer by layer)
        and `logits`.
    """
    select_parameters(model, stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    in_weights = sum(_num_bytes(t) for t in (*model.parameters(), *model.buffers()))
    num_trained = sum(p.numel() for p in trained)
    item = 4 if precision == "float32" else 2
    return {
        "weights": in_weights
        + (num_trained * item if item < 4 else 0),  # autocast keeps a copy of what is trained
        "gradients": sum(map(_num_bytes, trained)),
        "optimizer": num_trained * STATE_BYTES[config.optimizer],
        "activations": _activations(config, model, stage, item),
        "logits": _logits(config, model, stage, item),
    }


def _activations(config: TrainingConfig, model: AudioFlamingo3WithHead, stage: StageConfig, item: int) -> int:
    text, audio = model.config.text_config, model.config.audio_config
    batch = stage.batch or config.batch
    layer = _HIDDEN_KEPT * text.hidden_size + _INNER_KEPT * text.intermediate_size
    layers = text.num_hidden_layers
    if (
        "lora" in stage.learning_rates
        or "language_model" in stage.learning_rates
        or "projector" in stage.learning_rates
    ):
        per_token = layers * text.hidden_size + layer if config.gradient_checkpointing else layers * layer
    else:
        per_token = layer
    windows = math.ceil(_longest_audio_s(batch) / CHUNK_LENGTH_S)
    width = audio.hidden_size + audio.intermediate_size
    positions = windows * conv_length(N_FRAMES) * _ENCODER_WIDTHS * width
    if "encoder" in stage.learning_rates:
        positions *= (
            1 if config.gradient_checkpointing else (stage.encoder_last_layers or audio.num_hidden_layers)
        )
    return item * (batch.max_tokens * per_token + positions)


def _longest_audio_s(batch: BatchConfig) -> float:
    by_tokens = batch.max_tokens / AUDIO_TOKENS_PER_S
    return by_tokens if batch.max_audio_s is None else min(by_tokens, batch.max_audio_s)


def _logits(config: TrainingConfig, model: AudioFlamingo3WithHead, stage: StageConfig, item: int) -> int:
    if stage.answer_weight == 0:
        return 0
    batch = stage.batch or config.batch
    positions = min(LOSS_CHUNK, batch.max_tokens)
    return positions * int(model.config.text_config.vocab_size) * (item + 3 * 4)  # and three turns of float32


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def estimate_step_s(
    config: TrainingConfig, model: nn.Module, stage: StageConfig, tokens: float, windows: float, speed: float
) -> float:
    """Seconds of one optimizer step on one device.

    Args:
        config: of the run.
        model: as `select_parameters` left it.
        stage: of the run.
        tokens: of a step.
        windows: of a step.
        speed: multiplications and additions a second, of `measure_speed`.
    """
    sizes: Counter[str] = Counter()
    for name in ("audio_tower", "multi_modal_projector", "language_model"):
        sizes[name] = num_parameters(model.get_submodule(f"model.{name}"))
    trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    passes = 1 + (1 if config.gradient_checkpointing else 0)
    text = sizes["language_model"] + sizes["multi_modal_projector"]
    work = 0.0
    if stage.answer_weight > 0:
        work += tokens * text * (passes + 1 + (1 if "language_model" in trained else 0))
    positions = windows * conv_length(N_FRAMES)
    encoder_passes = passes + 2 if "encoder" in trained else (0 if config.feature_cache is not None else 1)
    work += positions * sizes["audio_tower"] * encoder_passes
    return 2 * work / (speed * UTILIZATION)


def measure_speed(device: torch.device, precision: str, sizes: Sequence[int] = (_PRODUCT,) * 3) -> float:
    """Operations a second of a large matrix product: the best of a few."""
    dtype = getattr(torch, precision)
    rows, inner, columns = sizes
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, columns, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best
