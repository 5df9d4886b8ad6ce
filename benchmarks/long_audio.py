"""Does long audio fit? Peak memory and time of prefilling ten or thirty minutes, at the real width and a few layers.

Activations do not add up over layers, so what a few layers need on top of their weights is what all need, but for the
key/value cache, which is printed for the full depth. transformers forms the logits of all 15,000 positions in a plain
forward (9 GB in float32); a prefill here forms one.

    python benchmarks/long_audio.py --seconds 600 --layers 1

Up to 600 s are heard by Audio Flamingo 3, more by Audio Flamingo Next (Music Flamingo with 131,072 positions).
Processor time is printed beside the wall clock's: it holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from typing import Any

import torch

from audioflamingo import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
from audioflamingo.audio import num_audio_tokens
from audioflamingo.config import MusicFlamingoConfig
from audioflamingo.model import model_class_of

GB = 1e9
WINDOW_FRAMES = 3000
AF3_S = 600  # longest audio of Audio Flamingo 3


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(seconds: int, num_layers: int, dtype: torch.dtype) -> AudioFlamingo3ForConditionalGeneration:
    """The published widths with `num_layers` layers in encoder and language model; small constant weights."""
    published = AudioFlamingo3Config()
    kind, text = AudioFlamingo3Config, published.text_config
    if seconds > AF3_S:
        kind, text = MusicFlamingoConfig, replace(text, max_position_embeddings=131072, rope_theta=15.3e6)
    config = kind(
        replace(published.audio_config, num_hidden_layers=num_layers),
        replace(text, num_hidden_layers=num_layers),
    )
    with torch.device("meta"):
        model = model_class_of(config)(config).to(dtype)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="a multiple of 30")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()

    model = build(options.seconds, options.layers, getattr(torch, options.dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    num_windows = options.seconds // 30
    num_tokens = num_windows * num_audio_tokens(WINDOW_FRAMES)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[1] * 10 + [model.config.audio_token_id] * num_tokens + [2] * 10]),
        "input_features": torch.zeros(num_windows, 128, WINDOW_FRAMES),
        "input_features_mask": torch.ones(num_windows, WINDOW_FRAMES, dtype=torch.int32),
    }
    before = peak_bytes()
    start, processor_start = time.perf_counter(), time.process_time()
    model.generate(**inputs, max_new_tokens=1)
    seconds, processor_s = time.perf_counter() - start, time.process_time() - processor_start
    text = AudioFlamingo3Config().text_config
    assert text.head_dim is not None
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * num_tokens
    result = {
        "benchmark": "long_audio",
        "model_type": model.config.model_type,
        "audio_s": options.seconds,
        "tokens": num_tokens,
        "layers": options.layers,
        "dtype": options.dtype,
        "weights_gb": weights / GB,
        "peak_above_weights_gb": (peak_bytes() - before) / GB,
        "full_depth_bfloat16_cache_gb": cache / GB,
        "seconds": seconds,
        "processor_s": processor_s,
        "threads": torch.get_num_threads(),
    }
    print(
        f"{options.seconds} s of audio, {num_tokens} audio tokens, {options.layers} + {options.layers} layers, "
        f"{options.dtype}: {result['peak_above_weights_gb']:.2f} GB above {weights / GB:.2f} GB of weights, "
        f"{seconds:.0f} s (processor {processor_s:.0f} s); "
        f"the cache of all {text.num_hidden_layers} layers in bfloat16 is {cache / GB:.2f} GB"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
