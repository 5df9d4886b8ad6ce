"""How near to the machine's limits are the kernels of one layer, beside torch's bfloat16 product?

A few rows are bound by reading the weights, many rows by arithmetic, so each figure comes as GB/s of weights and as
GOP/s, beside two ceilings: reading a large buffer, and torch's largest bfloat16 and int8 matrix products. All take
turns in each round, weights are rotated so that none stays in a cache, and the fastest of each is kept: on a shared
machine the others measure the neighbours.

    python benchmarks/kernels.py --outputs 18944 --inputs 3584
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from audioflamingo import kernels

READ_BYTES = 400_000_000
CEILING_SIZE = 2048  # of the square matrix products
COPIES = 2  # of the weights
GROUP = 128

Call = Callable[[Tensor], Tensor]


def layers(num_out: int, num_in: int) -> dict[str, tuple[list[Call], int]]:
    """For each kind of layer: a call for each copy of its random weights, and the bytes of one copy."""
    shape, scales = (num_out, num_in), torch.rand(num_out)

    def packed(packed_shape: tuple[int, int]) -> list[Tensor]:
        return [torch.randint(0, 256, packed_shape, dtype=torch.uint8) for _ in range(COPIES)]

    int4 = packed(kernels.packed_int4_shape(shape, GROUP))
    int8 = packed(kernels.packed_int8_shape(shape))
    bf16 = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(COPIES)]
    return {
        "int4": (
            [lambda x, w=w: kernels.linear_int4(x, w, scales, None, shape, GROUP) for w in int4],
            int4[0].nbytes,
        ),
        "int8": (
            [lambda x, w=w: kernels.linear_int8(x, w, scales, None, shape) for w in int8],
            int8[0].nbytes,
        ),
        "bf16": ([lambda x, w=w: kernels.linear_halves(x, w) for w in bf16], bf16[0].nbytes),
        "F.linear": ([lambda x, w=w: F.linear(x, w) for w in bf16], bf16[0].nbytes),
    }


def ceilings() -> dict[str, tuple[Callable[[], Tensor], float]]:
    """What the machine can do: a call, and the GB or GOP of it."""
    buffer = torch.ones(READ_BYTES // 4)
    bf16 = torch.randn(CEILING_SIZE, CEILING_SIZE).bfloat16()
    int8 = torch.randint(-127, 128, (CEILING_SIZE, CEILING_SIZE), dtype=torch.int8)
    operations = 2 * CEILING_SIZE**3 / 1e9
    return {
        "read_gb_s": (buffer.sum, READ_BYTES / 1e9),
        "bf16_gop_s": (lambda: bf16 @ bf16, operations),
        "int8_gop_s": (lambda: torch._int_mm(int8, int8), operations),
    }


def seconds(call: Callable[..., Tensor], *arguments: Tensor) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=18944)
    parser.add_argument("--inputs", type=int, default=3584)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 136, 761])
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns of each kernel; a third of it for many rows"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    limits: dict[str, tuple[Callable[[], Tensor], float, list[float]]] = {
        name: (call, size, []) for name, (call, size) in ceilings().items()
    }
    kinds = layers(options.outputs, options.inputs)
    results = []
    print(
        f"{options.outputs} x {options.inputs}, backend {kernels.backend()}, {torch.get_num_threads()} threads"
    )
    print(f"{'rows':>5} {'layer':>9} {'ms':>9} {'GB/s':>7} {'GOP/s':>7}")
    with torch.inference_mode():
        for rows in options.rows:
            x = torch.randn(rows, options.inputs).bfloat16()
            taken: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(options.rounds if rows < 64 else max(options.rounds // 3, 1)):
                for call, _, times in limits.values():
                    times.append(seconds(call))
                for kind, (calls, _) in kinds.items():
                    taken[kind] += [seconds(call, x) for call in calls]
            for kind, times in taken.items():
                best = min(times)
                row = {
                    "rows": rows,
                    "layer": kind,
                    "ms": best * 1e3,
                    "gb_s": kinds[kind][1] / best / 1e9,
                    "gop_s": 2 * rows * options.outputs * options.inputs / best / 1e9,
                }
                results.append(row)
                print(f"{rows:5} {kind:>9} {row['ms']:9.3f} {row['gb_s']:7.1f} {row['gop_s']:7.0f}")
    measured = {name: size / min(times) for name, (_, size, times) in limits.items()}
    print("ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in measured.items()))
    print(
        json.dumps(
            {
                "benchmark": "kernels",
                "outputs": options.outputs,
                "inputs": options.inputs,
                "backend": kernels.backend(),
                "threads": torch.get_num_threads(),
                "ceilings": measured,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
