"""The kernels of a GPU without one: their arithmetic in Triton's interpreter, and that they compile for a real card.

Each in a process of its own, because the interpreter has to be chosen before triton is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton, which compiles the kernels"
)
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def run(script: str, *arguments: str) -> list[list[str]]:
    """The words of each line that a script prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(
        [sys.executable, HERE / script, *arguments], capture_output=True, text=True, check=False, env=env
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [line.split() for line in result.stdout.splitlines()]


def test_kernels_give_what_the_weights_stand_for() -> None:
    """Products within rounding, unpacked weights to the bit, for all shapes, groups, rows and dtypes."""
    lines = run("interpret_for_gpu.py")
    kinds = {kind.split("_")[0] for kind, _, _ in lines}
    assert kinds == {"unpack", "packed", "row", "rotate", "silu"}
    assert len(lines) > 80
    assert [line for line in lines if not float(line[1]) <= float(line[2])] == []


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_a_card(capability: str) -> None:
    """To machine code, at the published model's width; reads are 16 bytes wide, and no register is spilled.

    A head of 128 numbers is too little for wide reads.
    """
    lines = run("compile_for_gpu.py", capability)
    assert len(lines) == (15 if capability == "80" else 16)
    narrow = [line[0] for line in lines if line[1] != "128"]
    assert narrow == ["rotate"]
    assert [line for line in lines if line[2] != "0"] == []
