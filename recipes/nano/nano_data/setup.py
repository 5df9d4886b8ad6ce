"""The machine of the data build: Debian packages, unpacked data packages, a Python environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

RECIPE_DIR = Path(__file__).resolve().parent.parent
REQUIREMENTS = RECIPE_DIR / "requirements-data.txt"
STAMP = "requirements.done"


def read_list(name: str) -> list[str]:
    """Entries of a list file, without comments."""
    lines = (RECIPE_DIR / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def unpacked_dir(data_dir: Path) -> Path:
    """Where the data packages are unpacked, as a file system tree ("usr/share/...")."""
    return data_dir / "packages"


def install_debian_packages() -> None:
    """Installs the packages of apt-packages.txt that are missing (needs root, or sudo without a password)."""
    missing = [name for name in read_list("apt-packages.txt") if not _is_installed(name)]
    if missing:
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        subprocess.run([*sudo, "apt-get", "update", "-q"], check=True)
        install = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-q", "-y"]
        subprocess.run([*install, "--no-install-recommends", *missing], check=True)


def _is_installed(name: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${Status}", name]
    return "ok installed" in subprocess.run(query, capture_output=True, text=True, check=False).stdout


def ensure_environment(folder: Path) -> Path:
    """Makes the environment from requirements-data.txt; returns its interpreter."""
    python = folder / "bin" / "python"
    stamp, wanted = folder / STAMP, REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def is_inside(folder: Path) -> bool:
    """Whether this process runs in the environment `folder`."""
    return Path(sys.prefix).resolve() == folder.resolve()


def restart_in(python: Path) -> None:
    """Goes on as the same command in another interpreter, unless this is it."""
    if not is_inside(python.parent.parent):
        os.execv(str(python), [str(python), *sys.argv])
