"""How fast is attention on a CPU, beside torch's kernel? The encoder's and the prompt's shapes, one new token apart.

Fastest of `--repeats` calls each, in turns; torch gets what this package would give it: float32 where bfloat16 is slow.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from audioflamingo.kernels import backend
from audioflamingo.kernels.cpu_attention import attend_rows
from audioflamingo.kernels.halves import is_slow

# (name, heads, key heads, queries, keys, dimensions, whether it is causal)
SHAPES = (
    ("encoder, 30 s clip", 20, 20, 1500, 1500, 64, False),
    ("encoder, 5 s clip", 20, 20, 250, 250, 64, False),
    ("prompt, 761 tokens", 28, 4, 761, 761, 128, True),
    ("prompt, 136 tokens", 28, 4, 136, 136, 128, True),
    ("20 tokens behind 761", 28, 4, 20, 781, 128, True),
    ("built-in model, prompt of 320 tokens", 6, 6, 320, 320, 64, True),
)


def fastest(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each; the first round warms up."""
    seconds = [float("inf")] * len(calls)
    for turn in range(repeats + 1):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:
                seconds[number] = min(seconds[number], time.perf_counter() - start)
    return seconds


def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Torch's kernel on `(N, H, E)`."""
    tensors = [x.transpose(0, 1)[None] for x in (query, key, value)]
    if is_slow(query, len(query)):
        tensors = [x.float() for x in tensors]
    is_grouped = query.shape[1] != key.shape[1]
    queries, keys, values = tensors
    out = F.scaled_dot_product_attention(queries, keys, values, mask, 0.0, is_causal, enable_gqa=is_grouped)
    return out.to(query.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, heads, key_heads, num_queries, num_keys, head_dim, is_causal in SHAPES:
        mask, has_past = None, num_keys > num_queries
        if has_past:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        pairs = num_queries * num_keys - (num_queries * (num_queries - 1) // 2 if is_causal else 0)
        for dtype in (torch.float32, torch.bfloat16):
            query = torch.randn(num_queries, heads, head_dim).to(dtype)
            key, value = (torch.randn(num_keys, key_heads, head_dim).to(dtype) for _ in range(2))
            place = torch.tensor([0, num_queries]), torch.tensor([0]), torch.tensor([num_keys])
            ours, theirs = fastest(
                [
                    lambda q=query, k=key, v=value, p=place, c=is_causal: attend_rows(  # type: ignore[misc]
                        q, k, v, p, scale=q.shape[2] ** -0.5, is_causal=c
                    ),
                    lambda q=query, k=key, v=value, m=mask, c=is_causal and not has_past: torchs(
                        q, k, v, m, c
                    ),  # type: ignore[misc]
                ],
                options.repeats,
            )
            gflop_s = 4 * heads * pairs * head_dim / ours / 1e9
            rows.append(
                {
                    "what": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "seconds": ours,
                    "torch_seconds": theirs,
                    "ratio": ours / theirs,
                    "gflop_s": gflop_s,
                }
            )
            print(
                f"{name:38} {rows[-1]['dtype']:9} {ours * 1e3:8.2f} ms  torch {theirs * 1e3:8.2f} ms  "
                f"ratio {ours / theirs:.2f}  {gflop_s:.0f} GFLOP/s",
                flush=True,
            )
    matrix = torch.randn(1024, 1024)
    limit = 2 * 1024**3 / fastest([lambda: matrix @ matrix], options.repeats)[0] / 1e9
    print(f"torch's float32 product: {limit:.0f} GFLOP/s")
    lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    result = {"backend": backend(), "threads": options.threads, "product_gflop_s": limit, "rows": rows}
    print(json.dumps({**result, "lscpu": lscpu}))


if __name__ == "__main__":
    main()
