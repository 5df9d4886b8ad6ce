"""`af3 train` under FSDP on a CPU: `python -m tests.support.fsdp_on_cpu ARGUMENTS`, once for each process.

accelerate shards over GPUs only. Here its state is told that these gloo processes shard too; all that follows from
that, the wrapping, the gathered state and the steps, is what runs on GPUs. The plugin is made of `recipes/fsdp.json`,
as `accelerate launch` makes it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState

CONFIG = Path(__file__).parents[2] / "recipes" / "fsdp.json"


def set_environment() -> None:
    """What `accelerate launch` makes of the file."""
    for key, value in json.loads(CONFIG.read_text(encoding="utf-8"))["fsdp_config"].items():
        name = key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")
        os.environ[name] = str(value).lower() if isinstance(value, bool) else str(value)
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def main() -> None:
    set_environment()
    original = AcceleratorState.__init__

    def sharding(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = sharding
    from audioflamingo.cli.commands import app

    app(sys.argv[1:])


if __name__ == "__main__":
    main()
