"""A file as the recordings that it holds: what FFmpeg would not hear of it, or would read wrong.

Recordings are joined by writing one file behind the other; of two WAV, AIFF, AU or MP4 files FFmpeg hears the first. An
ID3 tag ahead of a RIFF header hides it. A WAV header with 24 valid bits in 32 is taken for another number format, and
the samples of RIFX for little-endian ones.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from audioflamingo.audio.damage import (
    IFF_BYTE_ORDERS,
    MP4_BOXES,
    UNKNOWN_WAV_BYTES,
    mp4_boxes,
    read_at,
    skip_id3,
)
from audioflamingo.errors import AudioError, warn

HIDDEN_BY_ID3 = (*IFF_BYTE_ORDERS, b"OggS", b".snd")
EXTENSIBLE = 0xFFFE  # the WAV format whose header has a number of valid bits
PCM_GUID = b"\1\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
# AU's numbers for WAV's format tags and bits, where the samples are the same.
AU_ENCODINGS = {(1, 16): 3, (1, 24): 4, (1, 32): 5, (3, 32): 6, (3, 64): 7, (7, 8): 1, (6, 8): 27}
MAX_JUNK = 1024  # bytes behind the samples that nobody misses: tags, filling
MAX_PARTS = 1000


class FilePart(io.RawIOBase):
    """A stretch of a file, as a file; a few of its bytes may read other than they are."""

    def __init__(self, file: BinaryIO, start: int, end: int, patches: dict[int, bytes] | None = None) -> None:
        super().__init__()
        self._file = file
        self._start, self._end = start, end
        self._patches = patches or {}  # by place in the part
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place in the part."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place in the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end - self._start}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; all that are left by default."""
        left = max(0, self._end - self._start - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = read_at(self._file, self._start + self._position, size)
        for place, patch in self._patches.items():
            at = place - self._position
            if -len(patch) < at < len(data):
                changed = bytearray(data)
                first, last = max(0, at), min(len(data), at + len(patch))
                changed[first:last] = patch[first - at : last - at]
                data = bytes(changed)
        self._position += len(data)
        return data


def split_parts(file: BinaryIO, name: str) -> list[BinaryIO]:
    """The recordings in a file, each as a file of its own; the file itself where there is nothing to mend.

    Args:
        file: seekable.
        name: what warnings call it.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    start = skip_id3(file)
    start = start if read_at(file, start, 4) in HIDDEN_BY_ID3 else 0
    magic = read_at(file, start, 12)
    if magic[:4] in IFF_BYTE_ORDERS:
        starts = list(_riff_starts(file, start, num_bytes, IFF_BYTE_ORDERS[magic[:4]], name))
    elif magic[:4] == b".snd":
        starts = list(_au_starts(file, start))
    elif magic[4:8] in MP4_BOXES:
        starts = list(_mp4_starts(file))
    else:
        starts = [start]
    if starts == [0] and magic[:4] != b"RIFX" and not _mended_bits(file, 0):
        return [file]
    ends = [*starts[1:], num_bytes]
    part_of = _big_endian_part if magic[:4] == b"RIFX" else _mended_part
    return [part_of(file, first, end, name) for first, end in zip(starts, ends, strict=True)]


def _mended_part(file: BinaryIO, start: int, end: int, _: str) -> BinaryIO:
    return _part(file, start, end, _mended_bits(file, start))


def _big_endian_part(file: BinaryIO, start: int, end: int, name: str) -> BinaryIO:
    """A RIFX file with the header of an AU file, which has the same samples: FFmpeg takes RIFX's for little-endian."""
    position, fmt = start + 12, b""
    while len(header := read_at(file, position, 8)) == 8:
        kind, length = struct.unpack(">4sI", header)
        if kind == b"fmt ":
            fmt = file.read(16)
        elif kind == b"data" and len(fmt) == 16:
            tag, channels, rate, _, _, bits = struct.unpack(">HHIIHH", fmt)
            if (tag, bits) not in AU_ENCODINGS:
                break
            is_known = 0 < length < UNKNOWN_WAV_BYTES
            fields = (24, length if is_known else 0xFFFFFFFF, AU_ENCODINGS[tag, bits], rate, channels)
            return _part(file, position + 8 - 24, end, {0: struct.pack(">4s5I", b".snd", *fields)})
        position += 8 + length + length % 2
    raise AudioError(
        f"{name}: this kind of WAV with high bytes first (RIFX) is not read. Convert it to WAV or FLAC."
    )


def _part(file: BinaryIO, start: int, end: int, patches: dict[int, bytes]) -> BinaryIO:
    part: BinaryIO = FilePart(file, start, end, patches)  # type: ignore[assignment]
    return part


def _riff_starts(file: BinaryIO, start: int, num_bytes: int, byte_order: str, name: str) -> Iterator[int]:
    """Where RIFF (or AIFF) files begin, one behind the other."""
    yield start
    position, is_heard, num_parts = start + 12, False, 1
    long_length = 0
    while len(header := read_at(file, position, 8)) == 8:
        kind, length = struct.unpack(f"{byte_order}4sI", header)
        if kind in IFF_BYTE_ORDERS and is_heard and num_parts < MAX_PARTS:
            yield position
            position, is_heard, long_length, num_parts = position + 12, False, 0, num_parts + 1
            continue
        if kind == b"ds64":
            long_length = int.from_bytes(file.read(16)[8:], "little")
        if kind in (b"data", b"SSND"):
            length, is_heard = long_length or length, True
            if not long_length and not 0 < length < UNKNOWN_WAV_BYTES:
                return
        elif is_heard and not _is_chunk(kind, position + 8 + length, num_bytes):
            _warn_of_rest(file, position, num_bytes, name)
            return
        end = position + 8 + length
        is_padded = length % 2 and not (is_heard and read_at(file, end, 4) in IFF_BYTE_ORDERS)
        position = end + 1 if is_padded else end


def _is_chunk(kind: bytes, end: int, num_bytes: int) -> bool:
    return all(32 <= byte < 127 for byte in kind) and end <= num_bytes + 1


def _warn_of_rest(file: BinaryIO, position: int, num_bytes: int, name: str) -> None:
    """Warns of bytes behind the samples that may be samples too: a header that was never brought up to date."""
    rest = num_bytes - position
    head = read_at(file, position, 3)
    if rest > MAX_JUNK and head not in (b"ID3", b"TAG") and any(read_at(file, position, 1 << 16)):
        warn(
            f"{name}: {rest} bytes behind its sample data are not heard, because its header does not count them in. If "
            "they are samples, mend the header: ffmpeg -ignore_length 1 -i FILE out.wav"
        )


def _au_starts(file: BinaryIO, start: int) -> Iterator[int]:
    position = start
    while len(header := read_at(file, position, 12)) == 12 and header[:4] == b".snd":
        yield position
        offset, length = struct.unpack(">II", header[4:])
        if offset < 24 or length >= UNKNOWN_WAV_BYTES:
            return
        position += offset + length


def _mp4_starts(file: BinaryIO) -> Iterator[int]:
    """Where MP4 files begin: at each `ftyp` that has a `moov` of its own."""
    yield 0
    candidate: int | None = None  # an `ftyp` whose `moov` is still to come
    position, has_moov = 0, False
    for kind, end in mp4_boxes(file):
        if kind == b"ftyp" and has_moov and candidate is None:
            candidate = position
        elif kind == b"moov":
            if candidate is not None:
                yield candidate
            candidate, has_moov = None, True
        position = end


def _mended_bits(file: BinaryIO, start: int) -> dict[int, bytes]:
    """For integer samples that fill fewer bits than they have: the header without that, as they are high bits."""
    if read_at(file, start, 4) not in (b"RIFF", b"RF64"):
        return {}
    position = 12
    for _ in range(100):
        header = read_at(file, start + position, 8)
        if len(header) < 8 or header[:4] == b"data":
            return {}
        length = int.from_bytes(header[4:], "little")
        if header[:4] == b"fmt " and length >= 40:
            content = file.read(40)
            kind, bits, valid_bits = content[:2], content[14:16], content[18:20]
            is_pcm = int.from_bytes(kind, "little") == EXTENSIBLE and content[24:40] == PCM_GUID
            return {position + 8 + 18: bits} if is_pcm and bits != valid_bits else {}
        position += 8 + length + length % 2
    return {}
