"""What the headers of an audio file claim, against what is there: a file that was cut off, or changed on the way.

The containers are read with the few lines that this takes: RIFF and AIFF chunks, Ogg pages with their checksums
(RFC 3533), MP4 boxes (ISO/IEC 14496-12), the EBML head of Matroska (RFC 8794), the Xing or Info frame of an mp3.
Nothing is decoded here.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO, NamedTuple

UNKNOWN_WAV_BYTES = 0x7FFF0000  # from here on, and 0: what a recorder writes that does not know the size yet
MP4_BOXES = frozenset(
    b"ftyp moov mdat moof free skip wide styp sidx ssix mfra uuid udta meta pdin emsg prft pnot".split()
)
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
EBML_MAGIC = b"\x1a\x45\xdf\xa3"
EBML_SEGMENT = b"\x18\x53\x80\x67"


def find_damage(file: BinaryIO) -> str | None:
    """Says what is missing of a file whose headers announce more bytes than there are, or is damaged in it.

    Knows WAV (RF64), AIFF, Ogg, MP4, Matroska (WebM) and mp3 with a Xing or Info header; None for any other
    file, and for one whose sizes are unknown, as live recordings have them.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    magic = _read_at(file, 0, 12)
    if magic[:4] in (b"RIFF", b"RF64", b"FORM"):
        return _find_iff_truncation(file, num_bytes, ">" if magic[:4] == b"FORM" else "<")
    if magic[:4] == b"OggS":
        return _find_ogg_damage(file, num_bytes)
    if magic[4:8] in MP4_BOXES:
        return _find_mp4_truncation(file, num_bytes)
    if magic[:4] == EBML_MAGIC:
        return _find_matroska_truncation(file, num_bytes)
    if magic[:3] == b"ID3" or magic[:1] == b"\xff":
        return _missing("its audio", read_xing_header(file).end_byte or 0, num_bytes)
    return None


def _read_at(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)


def _missing(what: str, end: int, num_bytes: int) -> str | None:
    return f"{what} ends at byte {end} and the file at byte {num_bytes}" if end > num_bytes else None


def _find_iff_truncation(file: BinaryIO, num_bytes: int, byte_order: str) -> str | None:
    position, long_length = 12, 0
    while len(header := _read_at(file, position, 8)) == 8:
        kind, length = struct.unpack(f"{byte_order}4sI", header)
        if kind == b"ds64":  # RF64: 64-bit sizes of the file and of its sample data
            long_length = int.from_bytes(file.read(16)[8:], "little")
        if kind in (b"data", b"SSND"):
            length = long_length or length
            is_known = long_length or 0 < length < UNKNOWN_WAV_BYTES
            return _missing("its sample data", position + 8 + length, num_bytes) if is_known else None
        position += 8 + length + length % 2
    return None


def _find_ogg_damage(file: BinaryIO, num_bytes: int) -> str | None:
    position, is_ended = 0, False
    while position < num_bytes:
        header = _read_at(file, position, 27)
        if header[:4] != b"OggS"[: len(header)]:
            return None if is_ended else f"no Ogg page starts at byte {position}, where one should"
        segments = file.read(header[26]) if len(header) == 27 else b""
        body = file.read(sum(segments))
        if len(header) < 27 or len(segments) < header[26] or len(body) < sum(segments):
            return f"the Ogg page at byte {position} is incomplete"
        page = header[:22] + bytes(4) + header[26:] + segments + body
        if _ogg_checksum(page) != int.from_bytes(header[22:26], "little"):
            return f"the Ogg page at byte {position} does not match its checksum"
        is_ended = bool(header[5] & 4)
        position += len(page)
    return None


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of zlib's polynomial, but starting at 0 and with the most significant bit first."""
    reflected = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _find_mp4_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    position = 0
    while len(header := _read_at(file, position, 16)) >= 8:
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if kind not in MP4_BOXES or length < 8:  # 0: up to the end of the file; else junk after the last box
            return None
        position += length
        if missing := _missing(f"its box {kind.decode()!r}", position, num_bytes):
            return missing
    return None


def _find_matroska_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    header_bytes, start = _read_ebml_size(file, 4)
    if header_bytes is None or _read_at(file, start + header_bytes, 4) != EBML_SEGMENT:
        return None
    segment_bytes, start = _read_ebml_size(file, start + header_bytes + 4)
    return None if segment_bytes is None else _missing("its segment", start + segment_bytes, num_bytes)


def _read_ebml_size(file: BinaryIO, position: int) -> tuple[int | None, int]:
    """Reads a variable-length size: (size or None if unknown, position after it)."""
    raw = _read_at(file, position, 8)
    if not raw or not raw[0]:
        return None, position
    width = 9 - raw[0].bit_length()
    mask = (1 << 7 * width) - 1
    size = int.from_bytes(raw[:width], "big") & mask
    return (None if size == mask or len(raw) < width else size), position + width


class XingHeader(NamedTuple):
    """What the first frame of an mp3 may say of the others. Padding: samples added at both ends together."""

    end_byte: int | None = None
    num_frames: int | None = None
    num_padding: int = 0


def read_xing_header(file: BinaryIO) -> XingHeader:
    """What an mp3 says of itself, if it does."""
    start = 0
    header = _read_at(file, 0, 10)
    if header[:3] == b"ID3" and len(header) == 10:  # 7 bits a byte; bit 4 of the flags: a footer follows
        start = 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(header[6:]))
        start += 10 * (header[5] >> 4 & 1)
    frame = _read_at(file, start, 256)
    offset = max(frame.find(b"Xing"), frame.find(b"Info"))
    if offset < 0 or len(frame) < offset + 144:
        return XingHeader()
    flags, first, second = struct.unpack(">3I", frame[offset + 4 : offset + 16])
    has_frames, has_bytes = flags & 1, flags & 2
    if flags > 15:
        return XingHeader()
    padding = int.from_bytes(frame[offset + 141 : offset + 144], "big")  # LAME: 12 bits before, 12 after
    return XingHeader(
        end_byte=start + (second if has_frames else first) if has_bytes else None,
        num_frames=first if has_frames else None,
        num_padding=(padding >> 12) + (padding & 4095),
    )
