"""Peak memory of a training step at the published widths, measured with few layers and held against the estimate.

    python benchmarks/training_memory.py [--layers 1 3] [--tokens 1500] [--quantization int4]

Each number of layers runs in a process of its own, with random integers for weights: their values change nothing here.
The slope gives all 28 layers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import resource
import subprocess
import sys
import time

NUM_LAYERS = 28
KIB = 1024


def run_step(num_layers: int, num_tokens: int, quantization: str) -> dict[str, float]:
    """One step of LoRA on a random model of so many layers: bytes at the peak, estimated and measured."""
    import torch

    from audioflamingo.config import AudioFlamingo3Config
    from audioflamingo.training.batches import Batch
    from audioflamingo.training.estimate import empty_model, estimate_memory
    from audioflamingo.training.module import TrainingModule
    from audioflamingo.training.parts import build_optimizer, select_parameters
    from audioflamingo.training.settings import build
    from audioflamingo.training.training_config import TrainingConfig

    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
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
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 119, generator=generator)  # halves and scales that stay in range
        else:
            tensor.data.normal_(0, 0.01, generator=generator)
    select_parameters(model, config.stages[0])
    model.gradient_checkpointing_enable()
    module = TrainingModule(model).train()
    model.model.audio_tower.eval()
    optimizer = build_optimizer(module, config.stages[0])
    ids = torch.randint(0, 1000, (1, num_tokens), generator=generator)
    ids[0, 10:760] = model.config.audio_token_id
    labels = ids.clone()
    labels[0, :800] = -100
    batch = Batch(["one"], 30.0, ids, torch.ones_like(ids), labels, torch.ones(1), float(num_tokens - 800))
    batch.input_features = torch.zeros(1, shape.audio_config.num_mel_bins, 3000)
    batch.input_features_mask = torch.ones(1, 3000, dtype=torch.long)
    began = time.process_time()
    module(batch)["answer"].backward()
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return {"peak": peak - start, "estimate": sum(estimate.values()), "cpu_s": time.process_time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 3])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--quantization", choices=["int4", "int8"], default="int4")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_step(options.one, options.tokens, options.quantization)))
        return
    results = {}
    for layers in options.layers:
        command = [sys.executable, __file__, "--one", str(layers), "--tokens", str(options.tokens)]
        command += ["--quantization", options.quantization]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[layers] = json.loads(output.splitlines()[-1])
        print(f"{layers} layers: {results[layers]}")
    few, more = options.layers
    whole = {}
    for name in ("peak", "estimate"):
        slope = (results[more][name] - results[few][name]) / (more - few)
        whole[name] = results[few][name] + slope * (NUM_LAYERS - few)
    print(
        json.dumps(
            {"quantization": options.quantization, "tokens": options.tokens, "layers": NUM_LAYERS, **whole}
        )
    )


if __name__ == "__main__":
    main()
