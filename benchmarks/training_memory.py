"""Peak memory of a training step at the published widths, measured with few layers and held against the estimate.

    python benchmarks/training_memory.py [--layers 1 2 4] [--tokens 1500] [--quantization int4]

Each number of layers runs in a process of its own, with random integers for weights: their values change nothing here.
The peak of resident memory is taken anew in each phase of a step (Linux only), and each phase has a line through its
peaks: the peak of all 28 layers is the highest of these lines there, since the phase that is the highest with few
layers need not be the highest with many. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

NUM_LAYERS = 28
KIB = 1024
PEAKS = Path("/proc/self/clear_refs")


def memory(name: str) -> int:
    """Resident bytes: `VmRSS` now, `VmHWM` at the peak since it was last forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(f"{name}:"))


@contextmanager
def phase(name: str, peaks: dict[str, int], start: int) -> Iterator[None]:
    """Takes the peak of what runs inside."""
    PEAKS.write_text("5", encoding="utf-8")
    yield
    peaks[name] = memory("VmHWM") - start
    print(
        f"{name}: {peaks[name] / 1e9:.2f} GB, {(memory('VmRSS') - start) / 1e9:.2f} GB after it",
        file=sys.stderr,
    )


def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random values, the same block again and again: drawing a billion of them takes longer than the step."""
    flat = tensor.data.view(-1)
    block = torch.empty(min(len(flat), 1 << 20), dtype=tensor.dtype)
    if tensor.dtype == torch.uint8:
        block.random_(0, 119, generator=generator)  # halves and scales that stay in range
    else:
        block.normal_(0, 0.01, generator=generator)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])


def run_step(num_layers: int, num_tokens: int, num_labels: int, quantization: str) -> dict[str, float]:
    """One step of LoRA on a random model of so many layers: bytes at the peak, estimated and measured."""
    from audioflamingo.config import AudioFlamingo3Config
    from audioflamingo.engine.memory import map_large_blocks
    from audioflamingo.training.batches import Batch
    from audioflamingo.training.estimate import empty_model, estimate_memory
    from audioflamingo.training.module import TrainingModule
    from audioflamingo.training.parts import build_optimizer, select_parameters
    from audioflamingo.training.settings import build
    from audioflamingo.training.training_config import TrainingConfig

    map_large_blocks()
    peaks: dict[str, int] = {}
    start = memory("VmRSS")
    values = {
        "model": "random",
        "output_dir": "none",
        "data": {"train": [{"path": "none"}]},
        "stages": [{"learning_rates": {"lora": 1e-4}, "max_steps": 1}],
        "batch": {"max_tokens": num_tokens, "max_audio_s": 30},
        "quantization": quantization,
        "gradient_checkpointing": True,
    }
    config = build(TrainingConfig, values)
    shape = copy.deepcopy(AudioFlamingo3Config())
    shape.text_config = dataclasses.replace(shape.text_config, num_hidden_layers=num_layers)
    shape.audio_config = dataclasses.replace(shape.audio_config, num_hidden_layers=num_layers)
    model = empty_model(config, shape)
    estimate = estimate_memory(config, model, config.stages[0], "float32")
    generator = torch.Generator().manual_seed(0)
    with phase("build", peaks, start):
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            fill(tensor, generator)
    select_parameters(model, config.stages[0])
    model.gradient_checkpointing_enable()
    module = TrainingModule(model).train()
    model.model.audio_tower.eval()
    optimizer = build_optimizer(module, config.stages[0])
    ids = torch.randint(0, 1000, (1, num_tokens), generator=generator)
    ids[0, 10:760] = model.config.audio_token_id
    labels = ids.clone()
    labels[0, :-num_labels] = -100
    batch = Batch(["one"], 30.0, ids, torch.ones_like(ids), labels, torch.ones(1), float(num_labels))
    batch.input_features = torch.zeros(1, shape.audio_config.num_mel_bins, 3000)
    batch.input_features_mask = torch.ones(1, 3000, dtype=torch.long)
    began = time.process_time()
    with phase("forward", peaks, start):
        loss = module(batch)["answer"]
    with phase("backward", peaks, start):
        loss.backward()
    with phase("update", peaks, start):
        optimizer.step()
    cpu_s = time.process_time() - began
    return {**peaks, "estimate": sum(estimate.values()), "cpu_s": cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument(
        "--labels", type=int, default=700, help="tokens that are learned: most of the time of a step"
    )
    parser.add_argument("--quantization", choices=["int4", "int8"], default="int4")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_step(options.one, options.tokens, options.labels, options.quantization)))
        return
    results: dict[str, list[float]] = {}
    for layers in options.layers:
        command = [sys.executable, __file__, "--one", str(layers), "--tokens", str(options.tokens)]
        command += ["--quantization", options.quantization, "--labels", str(options.labels)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(f"{layers} layers: {result}")
        for name, value in result.items():
            results.setdefault(name, []).append(value)
    del results["cpu_s"]
    lines = {name: np.polyfit(options.layers, values, 1) for name, values in results.items()}
    whole = {name: float(np.polyval(line, NUM_LAYERS)) for name, line in lines.items()}
    peak = max(value for name, value in whole.items() if name != "estimate")
    print(
        json.dumps(
            {
                "quantization": options.quantization,
                "tokens": options.tokens,
                "layers": NUM_LAYERS,
                "peak": peak,
            }
            | {"phases": whole}
        )
    )


if __name__ == "__main__":
    main()
