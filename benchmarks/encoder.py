"""What a short clip costs the encoder, beside transformers in the same run.

The encoder has Audio Flamingo 3's real width and a few layers. transformers encodes the full 30 s window whatever the
clip's length; ours encodes the frames that count. Both hold the same weights; outputs are compared before timing, and
the two take turns, so that a noisy machine disturbs both alike.

    python benchmarks/encoder.py --seconds 5 30 --layers 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from audioflamingo import AudioFlamingo3Encoder, AudioFlamingo3EncoderConfig
from audioflamingo.audio.loading import num_audio_tokens


def build(num_layers: int, dtype: torch.dtype) -> tuple[AudioFlamingo3Encoder, Any]:
    """Our encoder and transformers', with the same random weights."""
    torch.manual_seed(0)
    config = transformers.AudioFlamingo3EncoderConfig(num_hidden_layers=num_layers)
    theirs: Any = transformers.AudioFlamingo3Encoder(config)
    theirs = theirs.to(dtype).eval()
    with torch.device("meta"):
        ours = AudioFlamingo3Encoder(AudioFlamingo3EncoderConfig(num_hidden_layers=num_layers)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def time_in_turns(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of each call, the two alternating, after one warm-up of each."""
    first(), second()
    pairs = []
    for _ in range(repeats):
        seconds = []
        for call in (first, second):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        pairs.append((seconds[0], seconds[1]))
    return pairs


@torch.inference_mode()
def measure(duration_s: float, ours: Any, theirs: Any, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Checks that both encoders agree on a clip of `duration_s`, then times them."""
    num_frames = min(3000, round(duration_s * 100))
    features = torch.randn(1, 128, 3000).to(dtype)
    mask = (torch.arange(3000) < num_frames)[None].int()
    valid = num_audio_tokens(num_frames)
    difference = (
        ours(features, mask).last_hidden_state[0, :valid].float()
        - theirs(features, input_features_mask=mask).last_hidden_state[0, :valid].float()
    )
    pairs = time_in_turns(
        lambda: ours(features, mask), lambda: theirs(features, input_features_mask=mask), repeats
    )
    return {
        "duration_s": duration_s,
        "audioflamingo_s": statistics.median(p[0] for p in pairs),
        "transformers_s": statistics.median(p[1] for p in pairs),
        "ratio": statistics.median(p[0] / p[1] for p in pairs),
        "largest_difference": difference.abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[5.0, 30.0], help="clip lengths, at most 30 s each"
    )
    parser.add_argument("--layers", type=int, default=4, help="encoder layers (the published model has 32)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    ours, theirs = build(options.layers, dtype)
    print(
        f"{options.layers} layers at real width, {options.dtype}, {torch.get_num_threads()} threads, medians"
    )
    print(f"{'clip':>8} {'audioflamingo':>14} {'transformers':>14} {'ratio':>7} {'difference':>11}")
    results = []
    for duration_s in options.seconds:
        row = measure(duration_s, ours, theirs, dtype, options.repeats)
        results.append(row)
        print(
            f"{duration_s:6.1f} s {row['audioflamingo_s']:12.3f} s {row['transformers_s']:12.3f} s "
            f"{row['ratio']:7.3f} {row['largest_difference']:11.2e}"
        )
    print(
        json.dumps(
            {"benchmark": "encoder", "layers": options.layers, "dtype": options.dtype, "results": results}
        )
    )


if __name__ == "__main__":
    main()
