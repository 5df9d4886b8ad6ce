#!/usr/bin/env python3
"""Puts a trained model into the package: `python recipes/nano/ship_model.py --data-dir DATA DATA/run/model`.

Of several checkpoints of one training (`DATA/run/model DATA/more/model`) it takes the mean of their weights, and makes
it even for quantization (`nano_model.equalize`), by some conversations of the training data; by some of its recordings
it finds the heads that word times go by. Embeddings, output layer and the MLPs behind layer 0 are stored in float8
(E4M3), which transformers reads too, the rest in float16: so there is room for four times the vocabulary. The model's
card (README.md of the target) is written by hand and stays.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nano_model.layout import FLOAT8_MOST, QUOTE, START, STREAM_FACTOR, SYSTEM, float8_factor
from torch import Tensor

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.checkpoint.weights import hub_name
from audioflamingo.hub import BUILT_IN_FOLDER
from audioflamingo.quantization.quantize_model import FLOAT_KEY
from audioflamingo.training.parts import UNADAPTED_KEY
from audioflamingo.transcription import transcribe
from audioflamingo.transcription.alignment_heads import HEADS_KEY, SHARE_KEY

LARGEST_BYTES = 63_200_000  # beside the tokenizer
FLOAT8_TENSORS = re.compile(  # layer 0 counts positions: its codes have to be exact
    r"language_model\.(lm_head|model\.embed_tokens|model\.layers\.[1-9]\d*\.mlp\.(gate|up|down)_proj)\.weight"
)
FLOAT8_END = torch.finfo(torch.float8_e4m3fn).max
NUM_BEAMS = 1  # more help little
FLOAT_MODULES = [  # positions are codes that rounding would mix up; the outputs of self-attention hold large biases
    "model.language_model.embed_tokens",  # their flags, too
    "model.language_model.layers.0.",
    "model.language_model.layers.1.",  # states are short, masks large: in 4 bits its q or its gate breaks every answer
    "model.language_model.layers.2.",  # in 4 bits it costs .008 of the words of prompts
    "model.language_model.layers.8.",  # its attention in 4 bits costs .015
    *(f"model.language_model.layers.{layer}.mlp." for layer in range(3, 8)),  # float8 as it is; in 4 bits .07
    *(f"model.language_model.layers.{layer}.self_attn.o_proj" for layer in range(3, 8)),
]
UNADAPTED_LAYERS = [0]  # it counts positions: with an adapter in it the loss rises
LOOKED_AT = {
    "transcription": 10, "transcription_long": 2, "transcription_words": 4, "silence": 1, "sound": 3,
    "sound_choice": 2, "instrument": 2, "compare": 2, "follow_up": 2, "newcomer": 6, "text": 6,
}  # fmt: skip


def load_mean(sources: Sequence[Path]) -> AudioFlamingo3ForConditionalGeneration:
    """Loads the models, which checks them, and returns the first with the mean of all weights, in float32."""
    mean = AudioFlamingo3ForConditionalGeneration.from_pretrained(sources[0], dtype=torch.float32)
    for number, source in enumerate(sources[1:], start=2):
        other = AudioFlamingo3ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            for tensor, added in zip(mean.parameters(), other.parameters(), strict=True):
                tensor.lerp_(added, 1 / number)
    return mean


def some_inputs(data_dir: Path, processor: Any) -> list[dict[str, Any]]:
    """Inputs of the model out of the training data, the same each time."""
    rng = random.Random(0)
    inputs = []
    for kind, count in LOOKED_AT.items():
        lines = (data_dir / f"train_{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in rng.sample(lines, min(count, len(lines))):
            messages = json.loads(line)["messages"]
            for part in [part for message in messages for part in message["content"]]:
                if part["type"] == "audio":
                    part["path"] = str(data_dir / part["path"])
            inputs.append(dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True)))
    return inputs


def long_clips(data_dir: Path, count: int = 5) -> list[str]:
    """Paths of some recordings with many words."""
    lines = (data_dir / "train_transcription_long.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines[:count]]
    parts = [part for messages in rows for message in messages for part in message["content"]]
    return [str(data_dir / part["path"]) for part in parts if part["type"] == "audio"]


def name_heads(model: AudioFlamingo3ForConditionalGeneration, processor: Any, clips: Sequence[str]) -> None:
    """Has the model time words until heads are found that are sure: they are noted in its generation config."""
    known = model.generation_config.extra
    for key in (HEADS_KEY, SHARE_KEY):
        known.pop(key, None)  # of other weights
    for clip in clips:
        list(transcribe(model, processor, clip, word_timestamps=True))
        if HEADS_KEY in known:
            break
    print(f"word times by heads {known.get(HEADS_KEY)}, share {known.get(SHARE_KEY)}")


@torch.no_grad()
def round_what_is_found(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Rounds the embeddings of `assistant`, the quote and `system`: layer 0 finds them by flags behind a norm."""
    embeddings: Any = model.get_input_embeddings().weight
    for token in (embeddings[:, [START, QUOTE, SYSTEM]] != 0).any(1).nonzero()[:, 0]:
        embeddings[token] = in_float8_at_length(embeddings[token])


def in_float8_at_length(row: Tensor) -> Tensor:
    """An embedding (D,) rounded to what float8 holds, some values to the other side, so that its length stays."""
    nearest = row.to(torch.float8_e4m3fn).float()
    away = torch.where(nearest.abs() < row.abs(), 1, -1)  # from nought, or towards it
    bits = nearest.to(torch.float8_e4m3fn).view(torch.uint8).int()
    is_free = (nearest != 0) & (nearest != row)
    other = torch.where(is_free, bits + away, bits).to(torch.uint8).view(torch.float8_e4m3fn).float()
    gains = (other.pow(2) - nearest.pow(2)).masked_fill(~is_free, math.inf).double()
    missing = float(row.double().pow(2).sum() - nearest.double().pow(2).sum())
    rounded = nearest.clone()
    while True:
        left = (missing - gains).abs()
        place = int(left.argmin())
        if left[place] >= abs(missing):
            return rounded
        missing -= float(gains[place])
        rounded[place], gains[place] = other[place], math.inf


@torch.no_grad()
def scale_stream(model: AudioFlamingo3ForConditionalGeneration, factor: float) -> None:
    """Makes all that is added up between the layers larger, and the epsilon of the norms with it: no answer changes.

    Sinks are cut to what float8 holds: they are a single flag, which is the same behind a norm whatever its size. The
    changed epsilon is in force once the model is saved and loaded.
    """
    text: Any = model.model.language_model
    projector = model.model.multi_modal_projector
    text.embed_tokens.weight.mul_(factor).clamp_(-FLOAT8_END, FLOAT8_END)
    writers = [projector.linear_2.weight, projector.linear_2.bias]
    for layer in text.layers:
        writers += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    for tensor in writers:
        tensor.mul_(factor)
    model.config.text_config.rms_norm_eps *= factor**2


@torch.no_grad()
def make_fit_float8(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Puts the output layer's columns and the MLPs into float8's range, with the gains of the norms before them."""
    largest = model.lm_head.weight.abs().amax(0)
    factors = torch.exp2((largest / FLOAT8_MOST).clamp(min=1.0).log2().ceil())
    model.lm_head.weight.div_(factors)
    text: Any = model.model.language_model
    text.norm.weight.mul_(factors)
    for layer in text.layers[1:]:
        gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        factor = float8_factor(torch.stack([gate.abs().amax(), up.abs().amax()]))
        gate.mul_(factor)
        up.mul_(factor)
        layer.post_attention_layernorm.weight.div_(factor)


@torch.inference_mode()
def check_float16(model: AudioFlamingo3ForConditionalGeneration, inputs: Sequence[dict[str, Any]]) -> None:
    """Ends the program where a float16 model, as it is loaded by default, gives something that is not finite."""
    for number, each in enumerate(inputs):
        if not torch.isfinite(model(**each).logits).all():
            raise SystemExit(f"In float16 the logits of conversation {number} are not finite.")


@torch.no_grad()
def round_to_float8(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Rounds what `FLOAT8_TENSORS` matches to what float8 holds, in which a float16 model is saved then."""
    for name, tensor in model.state_dict().items():
        if FLOAT8_TENSORS.fullmatch(hub_name(name) or ""):
            if tensor.abs().max() > FLOAT8_END:
                raise SystemExit(f"{name} holds values that float8 cannot hold.")
            tensor.copy_(tensor.to(torch.float8_e4m3fn))


def ship(
    sources: Sequence[Path], target: Path, inputs: Sequence[dict[str, Any]] = (), clips: Sequence[str] = ()
) -> int:
    """Writes the mean of some models, made even by some inputs if there are any; returns its bytes.

    By the clips it finds the heads that word times go by.
    """
    from nano_model.equalize import equalize

    model = load_mean(sources)
    processor = AutoProcessor.from_pretrained(sources[0])
    if inputs:
        equalize(model, inputs)
    name_heads(model, processor, clips)
    scale_stream(model, STREAM_FACTOR)
    round_what_is_found(model)
    make_fit_float8(model)
    model = model.half()
    round_to_float8(model)
    check_float16(model, inputs)
    num_bytes = sum(
        tensor.numel() * (1 if FLOAT8_TENSORS.fullmatch(hub_name(name) or "") else 2)
        for name, tensor in model.state_dict().items()
    )
    if num_bytes > LARGEST_BYTES:
        raise SystemExit(
            f"{sources[0]} has {num_bytes / 1e6:.1f} MB of weights, more than {LARGEST_BYTES / 1e6} MB."
        )
    model.generation_config.num_beams = NUM_BEAMS
    model.config.extra |= {FLOAT_KEY: FLOAT_MODULES, UNADAPTED_KEY: UNADAPTED_LAYERS}
    model.save_pretrained(target)
    processor.save_pretrained(target)
    tokenizer = target / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]  # the shorter form
    tokenizer.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    return sum(path.stat().st_size for path in target.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="source", help="folder of a trained model")
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that build_data.py filled")
    parser.add_argument("--target", type=Path, default=BUILT_IN_FOLDER)
    arguments = parser.parse_args()
    looked_at = some_inputs(arguments.data_dir, AutoProcessor.from_pretrained(arguments.sources[0]))
    size = ship(arguments.sources, arguments.target, looked_at, long_clips(arguments.data_dir))
    print(f"{size / 1e6:.1f} MB in {arguments.target}")
