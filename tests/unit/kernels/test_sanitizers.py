"""The C++ sources under the address and undefined-behaviour sanitizers, on random shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import audioflamingo

SOURCES = sorted((Path(audioflamingo.__file__).parent / "kernels" / "csrc").glob("*.cpp"))
PROGRAM = Path(__file__).with_name("sanitized.cpp")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernels with sanitizers")
def test_kernels_stay_within_their_buffers(tmp_path: Path) -> None:
    compile_one = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-w", *SANITIZE, "-c"]
    jobs = [
        subprocess.Popen([*compile_one, source, "-o", tmp_path / f"{source.stem}.o"])
        for source in [*SOURCES, PROGRAM]
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    program = tmp_path / "sanitized"
    # libgomp, which nothing here needs by name, so that the kernels find its threads as they find torch's.
    link = ["g++", *SANITIZE, *tmp_path.glob("*.o"), "-ldl", "-Wl,--no-as-needed", "-lgomp", "-o", program]
    subprocess.run(link, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["OMP_WAIT_POLICY"] = "passive"  # waiting threads leave the cores to others
    run = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("levels 0 to")
