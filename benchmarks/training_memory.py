"""Peak memory of a training step at the published widths, held against the estimate.

    python benchmarks/training_memory.py --folder FOLDER --tokens 400 --labels 100 --audio-s 10
    python benchmarks/training_memory.py [--layers 1 2 4] [--tokens 1500] [--quantization int4]

The first takes a whole quantized checkpoint, as `af3 quantize` and `full_depth.py` write it (without a tokenizer, too),
and runs steps of LoRA on all of its layers. The second needs no checkpoint and little time: it extrapolates from few
layers. Each number of layers runs in a process of its own, with random integers for weights: their values change
nothing here. Each phase of a step has a line through its peaks: the peak of all 28 layers is the highest of these lines
there, since the phase that is the highest with few layers need not be the highest with many.

The peak of resident memory is taken anew in each phase (Linux only). The last line is JSON.
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
from typing import Any

import numpy as np
import torch

NUM_LAYERS = 28
KIB = 1024
PEAKS = Path("/proc/self/clear_refs")
PHASES = ("build", "forward", "backward", "update")


def memory(name: str) -> int:
    """Resident bytes: `VmRSS` now, `VmHWM` at the peak since it was last forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(f"{name}:"))


@contextmanager
def phase(name: str, peaks: dict[str, int], start: int) -> Iterator[None]:
    """Takes the peak of what runs inside, the highest of all steps."""
    PEAKS.write_text("5", encoding="utf-8")
    yield
    peaks[name] = max(peaks.get(name, 0), memory("VmHWM") - start)
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


def lora_config(options: argparse.Namespace) -> Any:
    """A run of LoRA with batches of the asked size."""
    from audioflamingo.training.settings import build
    from audioflamingo.training.training_config import TrainingConfig

    values = {
        "model": "random",
        "output_dir": "none",
        "data": {"train": [{"path": "none"}]},
        "stages": [{"learning_rates": {"lora": 1e-4}, "max_steps": 1}],
        "batch": {"max_tokens": options.tokens, "max_audio_s": options.audio_s},
        "quantization": options.quantization,
        "gradient_checkpointing": True,
    }
    return build(TrainingConfig, values)


def random_model(config: Any, num_layers: int, start: int, peaks: dict[str, int]) -> tuple[Any, int]:
    """A model of so many layers with random integers for weights, and the estimate for it."""
    from audioflamingo.config import AudioFlamingo3Config
    from audioflamingo.training.estimate import empty_model, estimate_memory

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
    return model, sum(estimate.values())


def stored_model(config: Any, folder: Path, start: int, peaks: dict[str, int]) -> tuple[Any, int]:
    """The model of a folder as training loads it, and the estimate for it."""
    from audioflamingo.checkpoint.pretrained import read_config
    from audioflamingo.model import AutoModelForConditionalGeneration
    from audioflamingo.training.estimate import empty_model, estimate_memory
    from audioflamingo.training.parts import add_lora

    estimate = estimate_memory(config, empty_model(config, read_config(folder)), config.stages[0], "float32")
    with phase("build", peaks, start):
        model = AutoModelForConditionalGeneration.from_pretrained(folder, dtype=config.weights_dtype)
        add_lora(model, config.lora)
    return model, sum(estimate.values())


def random_batch(options: argparse.Namespace, config: Any) -> Any:
    """One row: audio and text that is read, and labels."""
    from audioflamingo.config import AUDIO_TOKENS_PER_S
    from audioflamingo.training.batches import Batch

    ids = torch.randint(0, 1000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    ids[0, 10 : 10 + round(options.audio_s * AUDIO_TOKENS_PER_S)] = config.audio_token_id
    labels = ids.clone()
    labels[0, : -options.labels] = -100
    batch = Batch(
        ["one"], options.audio_s, ids, torch.ones_like(ids), labels, torch.ones(1), float(options.labels)
    )
    batch.input_features = torch.zeros(1, config.audio_config.num_mel_bins, 3000)
    batch.input_features_mask = (torch.arange(3000) < 100 * options.audio_s).long()[None]
    return batch


def run_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of LoRA: bytes at the peak, estimated and measured, and seconds of a step."""
    from audioflamingo.engine.memory import map_large_blocks
    from audioflamingo.training.module import TrainingModule
    from audioflamingo.training.parts import build_optimizer, select_parameters

    map_large_blocks()
    peaks: dict[str, int] = {}
    start = memory("VmRSS")
    config = lora_config(options)
    if options.folder is None:
        model, estimate = random_model(config, options.one, start, peaks)
    else:
        model, estimate = stored_model(config, options.folder, start, peaks)
    select_parameters(model, config.stages[0])
    model.gradient_checkpointing_enable()
    module = TrainingModule(model).train()
    model.model.audio_tower.eval()
    optimizer = build_optimizer(module, config.stages[0])
    batch = random_batch(options, model.config)
    cpu_s, wall_s, losses = [], [], []
    for _ in range(options.steps):
        began, began_wall = time.process_time(), time.perf_counter()
        with phase("forward", peaks, start):
            loss = module(batch)["answer"]
        with phase("backward", peaks, start):
            loss.backward()
        with phase("update", peaks, start):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        cpu_s.append(time.process_time() - began)
        wall_s.append(time.perf_counter() - began_wall)
        losses.append(loss.item() / options.labels)
    return {**peaks, "estimate": estimate, "cpu_s": cpu_s, "wall_s": wall_s, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument(
        "--labels", type=int, default=700, help="tokens that are learned: most of the time of a step"
    )
    parser.add_argument("--audio-s", type=float, default=30.0, help="seconds of audio in the row, at most 30")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--quantization", choices=["int4", "int8"], default="int4")
    parser.add_argument("--folder", type=Path, help="a quantized checkpoint, all of its layers")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("quantization", "tokens", "labels", "audio_s")}
    if options.folder is not None:
        result = run_steps(options)
        peak = max(result[name] for name in PHASES)
        print(json.dumps({**asked, "layers": NUM_LAYERS, "peak": peak, **result}))
        return
    if options.one is not None:
        print(json.dumps(run_steps(options)))
        return
    results: dict[str, list[float]] = {}
    for layers in options.layers:
        command = [sys.executable, __file__, "--one", str(layers), "--steps", str(options.steps)]
        command += [
            part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        print(f"{layers} layers: {result}")
        for name in (*PHASES, "estimate"):
            results.setdefault(name, []).append(result[name])
    lines = {name: np.polyfit(options.layers, values, 1) for name, values in results.items()}
    whole = {name: float(np.polyval(line, NUM_LAYERS)) for name, line in lines.items()}
    print(
        json.dumps(
            {**asked, "layers": NUM_LAYERS, "peak": max(whole[name] for name in PHASES), "phases": whole}
        )
    )


if __name__ == "__main__":
    main()
