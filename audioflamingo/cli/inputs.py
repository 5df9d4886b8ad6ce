"""What the user names -> sources of audio, and where each one's output goes."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from audioflamingo.errors import ArgumentError, AudioError

STDIN = "-"
_SUFFIX_NAMES = """
wav wave w64 rf64 aif aiff aifc caf au snd sph voc flac wv tta ogg oga opus mp3 mp2 m4a m4b mp4 aac ac3 eac3 webm mka
mkv mov amr 3gp ts mts m2ts mpg mpeg vob avi flv wma wmv asf
"""
MANIFEST_SUFFIX = ".jsonl"
MANIFEST_KEYS = ("path", "audio_filepath")  # the second is NeMo's
AUDIO_SUFFIXES = frozenset(f".{name}" for name in _SUFFIX_NAMES.split())


@dataclass(frozen=True)
class Input:
    """One audio to work on.

    Attributes:
        name: what it is called on the screen.
        output_stem: path of its outputs below the output folder, without the ending of the format.
        path: the file; None for a URL or standard input.
        error: why there is nothing to work on.
    """

    name: str
    output_stem: PurePosixPath
    path: Path | None = None
    error: AudioError | None = None

    @property
    def source(self) -> Any:
        """What `load_audio` takes."""
        if self.path is not None:
            return self.path
        return sys.stdin.buffer if self.name == STDIN else self.name


def find_inputs(arguments: Sequence[str]) -> list[Input]:
    """Expands files, folders (with all below them), patterns, lists of files, URLs and `-`; each audio once, in order.

    What does not exist becomes an `Input` with an error, so that the others go on.

    Raises:
        ArgumentError: a list of files cannot be read.
    """
    found: dict[str, Input] = {}
    for argument in arguments:
        for item in _expand(argument):
            key = item.name if item.path is None else os.path.abspath(item.path)
            found.setdefault(key, item)
    return _with_distinct_outputs(list(found.values()))


def _expand(argument: str) -> Iterator[Input]:
    if argument == STDIN:
        yield Input(STDIN, PurePosixPath("stdin"))
        return
    if "://" in argument or argument.startswith("data:"):
        address = urlsplit(argument)
        name = PurePosixPath(unquote(address.path)).name if "://" in argument else "data"
        yield Input(argument, PurePosixPath(name or address.netloc or "audio"))
        return
    path = Path(argument).expanduser()
    if path.is_dir():
        yield from _expand_folder(path)
    elif path.suffix.lower() == MANIFEST_SUFFIX:
        yield from _expand_manifest(path)
    elif path.exists() or not glob.has_magic(argument):
        yield Input(argument, PurePosixPath(path.name), path)  # a file that is not there is found out later
    else:
        yield from _expand_pattern(argument)


def _expand_folder(folder: Path) -> Iterator[Input]:
    paths = sorted(path for path in _walk(folder) if path.suffix.lower() in AUDIO_SUFFIXES)
    for path in paths:
        yield Input(str(path), PurePosixPath(path.relative_to(folder)), path)
    if not paths:
        error = AudioError(
            f"{str(folder)!r}: no audio files in this folder or below it. Name the files themselves."
        )
        yield Input(str(folder), PurePosixPath(folder.name), folder, error)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root) / name for name in files if not name.startswith("."))


def _expand_manifest(manifest: Path) -> Iterator[Input]:
    """The files of a list: a JSON object a line, paths relative to the list's own folder."""
    try:
        lines = manifest.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"cannot read the list of files {str(manifest)!r}: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = _manifest_entry(line)
        if name is None:
            raise ArgumentError(
                f"line {number} of {str(manifest)!r} must be a JSON object with the path of a file under "
                f"{' or '.join(map(repr, MANIFEST_KEYS))}, got {line[:80]!r}."
            )
        if "://" in name:
            yield from _expand(name)
        else:
            path = manifest.parent / Path(name).expanduser()
            yield Input(str(path), PurePosixPath(path.name), path)


def _manifest_entry(line: str) -> str | None:
    """The path that a line of a list names; None if there is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    names = [entry[key] for key in MANIFEST_KEYS if key in entry] if isinstance(entry, dict) else []
    return names[0] if names and isinstance(names[0], str) and names[0] else None


def _expand_pattern(pattern: str) -> Iterator[Input]:
    matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    for match in matches:
        if os.path.isdir(match):
            if any(path.suffix.lower() in AUDIO_SUFFIXES for path in _walk(Path(match))):
                yield from _expand_folder(Path(match))
        else:
            yield Input(match, PurePosixPath(Path(match).name), Path(match))
    if not matches:
        yield Input(
            pattern, PurePosixPath("pattern"), None, AudioError(f"{pattern!r}: no file matches this pattern.")
        )


def _with_distinct_outputs(inputs: list[Input]) -> list[Input]:
    """Outputs are named after the audio without its ending, or with it where two would share a name."""
    stems = [
        item.output_stem.with_suffix("") if item.output_stem.suffix else item.output_stem for item in inputs
    ]
    counts = Counter(str(stem).casefold() for stem in stems)
    chosen, taken = [], set()
    for item, stem in zip(inputs, stems, strict=True):
        name = stem if counts[str(stem).casefold()] == 1 else item.output_stem
        unique, number = name, 2
        while str(unique).casefold() in taken:
            unique, number = name.with_name(f"{name.name}-{number}"), number + 1
        taken.add(str(unique).casefold())
        chosen.append(Input(item.name, unique, item.path, item.error))
    return chosen
