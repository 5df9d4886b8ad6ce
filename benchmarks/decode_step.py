"""What is a quantized decode step made of? All layers in one call, layer by layer, and their products alone, in turns.

Two layers of the language model at real width with random weights; processor time of one thread. What is not products
is attention to the context (`--context 1`: nearly none), norms, rotation, SwiGLU, additions and the calls between.

    python benchmarks/decode_step.py --scheme int4 --context 760
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from audioflamingo import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, quantize
from audioflamingo.network.kv import KVStore, KVView, PackedLayout

NUM_LAYERS, ROOM, STEPS = 2, 1024, 6


def language_model(scheme: str) -> Any:
    """Two layers, quantized."""
    published = AudioFlamingo3Config()
    text = dataclasses.replace(published.text_config, num_hidden_layers=NUM_LAYERS, vocab_size=64)
    audio = dataclasses.replace(published.audio_config, num_hidden_layers=1)
    small = AudioFlamingo3Config(audio_config=audio, text_config=text, audio_token_id=63)
    model = AudioFlamingo3ForConditionalGeneration(small).bfloat16().eval()
    return quantize(model, scheme).model.language_model


def milliseconds(call: Callable[[], Any]) -> float:
    """Processor time of a call, the mean of a few."""
    start = time.process_time()
    for _ in range(STEPS):
        call()
    return (time.process_time() - start) / STEPS * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", choices=("int8", "int4"), default="int4")
    parser.add_argument("--rows", type=int, default=1, help="rows that take a step together, at most 16")
    parser.add_argument("--context", type=int, default=760, help="tokens before the new one, below 1024")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = language_model(options.scheme)
    store = KVStore(NUM_LAYERS, ROOM * options.rows)
    starts = [ROOM * row for row in range(options.rows)]
    x = torch.randn(options.rows, model.config.hidden_size).bfloat16()

    def step() -> None:
        past, new = [options.context] * options.rows, [1] * options.rows
        layout = PackedLayout.of(starts, past, new, torch.device("cpu"))
        model.forward_packed(x, KVView(store, layout))

    def layers() -> None:
        with mock.patch("audioflamingo.network.qwen2.run_step", return_value=None):
            step()

    linears = [module for name, module in model.layers.named_modules() if name.endswith("_proj")]
    inputs = {
        width: torch.randn(options.rows, width).bfloat16() for width in {m.in_features for m in linears}
    }

    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    calls = {"one call": step, "layer by layer": layers, "products alone": products}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        layers()  # makes the store
        for buffer in (*store.keys, *store.values):
            buffer.normal_()  # type: ignore[union-attr]
        for turn in range(options.rounds + 1):
            for name, call in calls.items():
                value = milliseconds(call)
                if turn:
                    seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.scheme}, {options.rows} rows, {options.context} tokens before, {NUM_LAYERS} layers:")
    for name, value in medians.items():
        rest = 1 - min(seconds["products alone"]) / min(seconds[name])
        print(
            f"{name:16} median {value:6.2f} ms, least {min(seconds[name]):6.2f} ms, not products {rest:.1%}"
        )


if __name__ == "__main__":
    main()
