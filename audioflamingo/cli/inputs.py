"""What the user names -> sources of audio, and where each one's output goes."""

from __future__ import annotations

import codecs
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from audioflamingo.errors import ArgumentError, AudioError, DataError

if TYPE_CHECKING:
    from audioflamingo.audio.stored import StoredAudio

STDIN = "-"
_SUFFIX_NAMES = """
wav wave w64 rf64 aif aiff aifc caf au snd sph voc flac wv tta ogg oga ogv opus mp3 mp2 mpga m4a m4b m4r m4v mp4
aac ac3 eac3 webm weba mka mkv mov qt qta amr 3gp 3gpp 3g2 ts mts m2ts mpg mpeg vob avi flv f4v wma wmv asf
"""
MANIFEST_SUFFIXES = (".jsonl", ".csv", ".tsv")
ROUNDING_S = 0.1  # by which a list may state a file shorter than it is
AUDIO_SUFFIXES = frozenset(f".{name}" for name in _SUFFIX_NAMES.split())


@dataclass(frozen=True)
class Input:
    """One audio to work on.

    Attributes:
        name: what it is called on the screen.
        output_stem: path of its outputs below the output folder, without the ending of the format.
        path: the file; None for a URL or standard input.
        error: why there is nothing to work on.
        stretch: the part of the file that is meant; None for all of it.
    """

    name: str
    output_stem: PurePosixPath
    path: Path | None = None
    error: AudioError | None = None
    stretch: StoredAudio | None = None

    @property
    def source(self) -> Any:
        """What `load_audio` takes."""
        if self.stretch is not None:
            return self.stretch
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
            key = item.name if item.path is None or item.stretch else os.path.abspath(item.path)
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
    elif path.suffix.lower() in MANIFEST_SUFFIXES or _is_json(path):
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


def _is_json(path: Path) -> bool:
    """Whether a file by the name of `.json` holds that: NeMo's lists do, an object a line."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")
    except OSError:
        return False  # its reader says why


def _expand_manifest(manifest: Path) -> Iterator[Input]:
    """The recordings of a list: an object a row (JSON Lines, a JSON list, CSV), paths relative to its own folder."""
    from audioflamingo.datasets.dataset_config import DatasetConfig
    from audioflamingo.datasets.row_files import read_entries
    from audioflamingo.datasets.row_forms import AUDIO_COLUMNS

    try:
        for entry in read_entries(DatasetConfig(path=str(manifest))):
            row = entry.value if isinstance(entry.value, dict) else {}
            name = next(
                (row[key] for key in AUDIO_COLUMNS if isinstance(row.get(key), str) and row[key]), None
            )
            if name is None:
                raise ArgumentError(
                    f"line {entry.place} of {str(manifest)!r} must be a JSON object with the path of a file under "
                    f"{' or '.join(map(repr, AUDIO_COLUMNS))}, got {str(entry.value)[:80]!r}."
                )
            if "://" in name:
                yield from _expand_address(name, row, f"{manifest}:{entry.place}")
            else:
                yield _row_input(manifest.parent / Path(name).expanduser(), row, f"{manifest}:{entry.place}")
    except DataError as error:
        raise ArgumentError(f"cannot read the list of files {str(manifest)!r}: {error}") from error


def _expand_address(name: str, row: Mapping[str, Any], place: str) -> Iterator[Input]:
    if _number(row, "offset", place):
        refusal = AudioError(
            f"{place}: the row is about a part of {name!r}, and addresses are heard whole; fetch it first."
        )
        yield Input(place, PurePosixPath("part"), None, refusal)
    else:
        yield from _expand(name)


def _row_input(path: Path, row: Mapping[str, Any], place: str) -> Input:
    """A file, or the stretch of it that `offset` and `duration` state, as NeMo's lists do."""
    from audioflamingo.audio.decoding import read_audio_info
    from audioflamingo.audio.stored import StoredAudio

    whole = Input(str(path), PurePosixPath(path.name), path)
    start_s, duration_s = _number(row, "offset", place) or 0.0, _number(row, "duration", place)
    if duration_s is not None and not start_s:
        info = read_audio_info(path) if path.is_file() else None
        if info is None or info.duration_s is None or duration_s >= info.duration_s - ROUNDING_S:
            return whole
    elif not start_s:
        return whole
    try:
        stretch = StoredAudio(str(path), start_s, duration_s)
    except ArgumentError as error:
        return Input(place, PurePosixPath("part"), None, AudioError(f"{place}: {error}"))
    ends = [start_s] if duration_s is None else [start_s, start_s + duration_s]
    times = "-".join(f"{round(end_s * 1000):09d}" for end_s in ends)
    return Input(str(stretch), PurePosixPath(f"{path.stem}_{times}{path.suffix}"), path, stretch=stretch)


def _number(row: Mapping[str, Any], key: str, place: str) -> float | None:
    """A number of a row, which CSV has as text.

    Raises:
        ArgumentError: it is none.
    """
    value = row.get(key)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{place}: {key} must be a number of seconds, got {value!r:.40}.") from None


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
        chosen.append(replace(item, output_stem=unique))
    return chosen
