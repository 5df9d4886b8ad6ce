"""Quantizing while loading takes the quantized size and one tensor, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.checkpoint.pretrained import config_to_save
from audioflamingo.checkpoint.saving import plan_shards, write_checkpoint
from audioflamingo.checkpoint.weights import hub_name
from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from tests.support.cli_runs import ROOT
from tests.support.tiny_model import tiny_config_dict

MEGABYTE = 1_000_000
# Prints how much memory, mapped files included, the statement took above what was there before, at most.
PROGRAM = """
import resource, sys, torch
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from audioflamingo.quantize_folder import quantize_checkpoint

torch.set_num_threads(1)
tiny, folder, out = sys.argv[2:]
Model.from_pretrained(tiny, quantization="int4")  # what is loaded once
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
{statement}
print(peak() - before)
"""
STATEMENTS = {
    "load": 'model = Model.from_pretrained(folder, quantization="int4"); print(model.get_memory_footprint())',
    "folder": 'quantize_checkpoint(folder, out, "int4"); print(0)',
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """158 MB of bfloat16 in one file, the largest tensor 16.8 MB; and a tiny one beside it."""
    root = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 8192}
    for name, changes in (("large", sizes), ("tiny", {"hidden_size": 64})):
        config = AudioFlamingo3Config.from_dict(tiny_config_dict(**changes))
        empty = build_empty(AudioFlamingo3ForConditionalGeneration, config).bfloat16()
        tensors = {str(hub_name(key)): tensor for key, tensor in empty.state_dict().items()}

        def read(key: str, tensors: dict[str, torch.Tensor] = tensors) -> torch.Tensor:
            return torch.rand(tensors[key].shape).bfloat16()

        shards = plan_shards(tensors, 10**12)
        write_checkpoint(root / name, shards, config_to_save(config, torch.bfloat16), {}, read=read)
    return root


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ru_maxrss in Linux's unit")
@pytest.mark.parametrize("way", STATEMENTS)
def test_memory_is_the_quantized_size_and_one_tensor(checkpoint: Path, way: str) -> None:
    program = PROGRAM.replace("{statement}", STATEMENTS[way])
    arguments = ["-c", program, "-", *(checkpoint / name for name in ("tiny", "large", "out"))]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, taken = map(int, result.stdout.split())
    largest, original = 16.8 * MEGABYTE, (checkpoint / "large/model.safetensors").stat().st_size
    allowance = 30 * MEGABYTE  # the allocator's, and what rounding a few rows takes
    limit = kept + largest + allowance
    assert limit < 0.75 * original, json.dumps([limit, original])
    assert taken < limit
