"""`af3 train` under FSDP on a CPU: `accelerate launch ... -m tests.support.fsdp_on_cpu ARGUMENTS`.

accelerate shards over GPUs only. Here its state is told that the launched gloo processes shard too; all before and
behind that, what the launcher makes of its file, the wrapping, the gathered state and the steps, is what runs on GPUs.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState


def main() -> None:
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
