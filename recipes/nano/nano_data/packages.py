"""The data packages: downloaded and unpacked, never installed."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

from .messages import read_table
from .setup import read_list, unpacked_dir

ZIPPED = {
    "0ad-data": "usr/share/games/0ad/mods/public/public.zip",
    "openarena-data": "usr/share/games/openarena/baseoa/pak0.pk3",
    "ufoai-sound": "usr/share/games/ufoai/base/0snd.pk3",
    "warzone2100-data": "usr/share/games/warzone2100/base.wz",
}  # package -> its files are in it
# Of the packages of these tables nothing else is unpacked.
ONLY_RECORDINGS = ("further_recordings.tsv", "zipped_recordings.tsv")


def unpack_data_packages(data_dir: Path) -> None:
    """Downloads and unpacks the packages of apt-data-packages.txt that are missing."""
    target = unpacked_dir(data_dir)
    target.mkdir(parents=True, exist_ok=True)
    for name in read_list("apt-data-packages.txt"):
        stamp = target / f".{name}.done"
        if stamp.exists():
            continue
        working = data_dir / f".download-{name}"
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        subprocess.run(["apt-get", "download", "-q", name], cwd=working, check=True)
        (archive,) = working.glob("*.deb")
        unpack(name, archive, target)
        shutil.rmtree(working)
        stamp.write_text(archive.name + "\n", encoding="utf-8")


def unpack(name: str, archive: Path, target: Path) -> None:
    """Unpacks a package: of those of `ONLY_RECORDINGS` only these, of others all files."""
    wanted = [
        row["files"] for table in ONLY_RECORDINGS for row in read_table(table) if row["package"] == name
    ]
    inner = ZIPPED.get(name)
    if not wanted:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
        return
    patterns = [*([inner] if inner else wanted), f"usr/share/doc/{name}/copyright"]
    tar = ["tar", "-x", "-C", str(target), "--wildcards", "--no-wildcards-match-slash"]
    tar += [f"./{pattern}" for pattern in patterns]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as files:
        subprocess.run(tar, stdin=files.stdout, check=True)
    if files.returncode:
        raise RuntimeError(f"{archive.name} cannot be read (dpkg-deb ended with {files.returncode})")
    if inner:
        unzip(target / inner, wanted)


def unzip(archive: Path, wanted: list[str]) -> None:
    """Unpacks what is wanted of a package's zip file beside it, and removes the zip file."""
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.namelist():
            if any((archive.parent / member).match(pattern) for pattern in wanted):
                zipped.extract(member, archive.parent)
    archive.unlink()
