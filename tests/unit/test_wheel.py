"""What users install: the source distribution, the wheel built from it, and the wheel in an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import audioflamingo

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests" / "data" / "directory_prompt.flac"


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel that was built from it and not from the repository."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "audioflamingo").rglob("*.py")}
    assert code <= names
    data = ("py.typed", "nano/model.safetensors", "nano/LICENSE-whisper", "server/page/index.html")
    assert {f"audioflamingo/{name}" for name in data} <= names
    assert {name.split("/")[0] for name in names} == {
        "audioflamingo",
        f"audioflamingo-{audioflamingo.__version__}.dist-info",
    }
    licences = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_one_wheel_is_for_every_python(wheel: Path) -> None:
    if "audioflamingo/kernels/_native.abi3.so" not in zipfile.ZipFile(wheel).namelist():
        pytest.skip("no C++ compiler here: the wheel has no kernels")
    assert f"-{audioflamingo.__version__}-cp311-abi3-linux_" in wheel.name


def test_the_source_distribution_has_what_a_build_needs(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "audioflamingo/kernels/csrc").iterdir()}
    assert {*sources, "LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_the_wheel_transcribes_in_an_environment_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are this environment's, by a path file: its own copy of the package is no part of it."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    python = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        wheel,
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    alone = {"PATH": str(home / "bin"), "CXX": "/nowhere/c++", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    where = run(python, "-P", "-c", "import audioflamingo; print(audioflamingo.__file__)", **alone)
    assert Path(where.strip()).is_relative_to(home)
    has_kernels = "audioflamingo/kernels/_native.abi3.so" in zipfile.ZipFile(wheel).namelist()
    program = "from audioflamingo.kernels import native; print(native.library() is not None)"
    assert run(python, "-P", "-c", program, **alone).strip() == str(has_kernels)
    assert "enter the first three letters of your party" in run(
        home / "bin" / "af3", "transcribe", SPEECH, "--quiet", **alone
    )
    assert run(home / "bin" / "af3", "--version", **alone) == f"af3 {audioflamingo.__version__}\n"
