"""What adapters cost: a decode step of a batch of 8 that mixes base and adapters, against the same batch of the base.

Real width, a few layers (the cost of each is alike), a small vocabulary so that the output layer, which adapters leave
alone and which is 7 % of a whole model, hides nothing; bfloat16 on the CPU, processor time; steps of both take turns,
so that whatever else runs here meets both.

    python benchmarks/adapters.py --layers 2 --rank 16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from audioflamingo import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.generate_call import prepare_one
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.network.adapters import AdapterWeights, Lora
from audioflamingo.processor.prompt import Prompt

BATCH = 8
PROMPT_TOKENS = 200
MIXES: dict[str, list[str | None]] = {
    "base": [None] * BATCH,
    "half of one adapter": [None, "a"] * 4,
    "base and three adapters": [None, "a", "b", "c"] * 2,
    "one adapter": ["a"] * BATCH,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(num_layers: int) -> AudioFlamingo3ForConditionalGeneration:
    """The published widths with random weights."""
    config = AudioFlamingo3Config.from_dict(
        {
            "audio_token_id": 4000,
            "audio_config": {"num_hidden_layers": 1},
            "text_config": {"num_hidden_layers": num_layers, "vocab_size": 4096},
        }
    )
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model


def add_adapters(model: AudioFlamingo3ForConditionalGeneration, rank: int) -> None:
    """Three LoRA adapters of all linear layers of the language model."""
    for name in "abc":
        lora = {}
        for module_name, module in model.named_modules():
            if module_name.startswith("model.language_model") and module_name.endswith(TARGETS):
                rows, columns = module.weight.shape
                down, up = (
                    torch.full(s, 0.01, dtype=torch.bfloat16) for s in ((rank, columns), (rows, rank))
                )
                lora[module_name] = Lora(down, up, 0.5)
        model.adapters.add(model, name, AdapterWeights(lora))


def begin(model: AudioFlamingo3ForConditionalGeneration, names: list[str | None], num_steps: int) -> Engine:
    """An engine that has read the prompts of a batch."""
    engine = Engine(model, None, EngineOptions.alone(BATCH))
    options = {"max_new_tokens": num_steps + 10, "eos_token_id": 1, "do_sample": False}
    for row, adapter in enumerate(names):
        prompt = Prompt([10 + row] * PROMPT_TOKENS)
        engine.submit(prepare_one(model, prompt, {**options, "adapter": adapter}))
    for _ in range(4):
        engine.step()
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    model = build(options.layers)
    add_adapters(model, options.rank)
    engines = {name: begin(model, mix, options.steps) for name, mix in MIXES.items()}
    times: dict[str, list[float]] = {name: [] for name in MIXES}
    for _ in range(options.steps):
        for name, engine in engines.items():
            start = time.process_time()
            engine.step()
            times[name].append(time.process_time() - start)
    base = statistics.median(times["base"])
    result = {
        "benchmark": "adapters",
        **vars(options),
        "threads": torch.get_num_threads(),
        "base_step_ms": round(base * 1000, 1),
        "times_of_base": {name: round(statistics.median(t) / base, 3) for name, t in times.items()},
    }
    for name, ratio in result["times_of_base"].items():
        print(f"{name:24} {ratio:.2f} of the base's step")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
