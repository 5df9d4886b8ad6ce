"""What the headers of an audio file claim, against what is there: a file that was cut off, or changed on the way.

The containers are read with the few lines that this takes: RIFF and AIFF chunks, Ogg pages with their checksums
(RFC 3533), MP4 boxes (ISO/IEC 14496-12), the Xing or Info frame of an mp3; Matroska's elements in `matroska`, others
in `stated_sizes`. Nothing is decoded here.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from audioflamingo.audio.matroska import find_matroska_damage, is_headless
from audioflamingo.audio.stated_sizes import (
    ASF_HEADER,
    find_ac3_truncation,
    find_asf_truncation,
    find_au_truncation,
    find_avi_truncation,
    find_flv_damage,
    find_ps_truncation,
    find_sphere_truncation,
    find_ts_truncation,
    find_voc_truncation,
    is_transport_stream,
    missing,
)

UNKNOWN_WAV_BYTES = 0x7FFF0000  # from here on, and 0: what a recorder writes that does not know the size yet
MP4_BOXES = frozenset(
    b"ftyp moov mdat moof free skip wide styp sidx ssix mfra uuid udta meta pdin emsg prft pnot".split()
)
IFF_BYTE_ORDERS = {b"RIFF": "<", b"RF64": "<", b"RIFX": ">", b"FORM": ">"}
MAX_POSITION = 1 << 62  # in any file
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
BY_MAGIC = (
    (b"\x1a\x45\xdf\xa3", find_matroska_damage),
    (b".snd", find_au_truncation),
    (b"\0\0\1\xba", find_ps_truncation),
    (b"\x0b\x77", find_ac3_truncation),
    (b"NIST", find_sphere_truncation),
    (b"Creative Voice File", find_voc_truncation),
    (b"FLV", find_flv_damage),
    (ASF_HEADER, find_asf_truncation),
)


def find_damage(file: BinaryIO) -> str | None:
    """Says what is missing of a file whose headers announce more bytes than there are, or is damaged in it.

    Knows WAV (RF64), AIFF, Ogg, MP4, Matroska (WebM), AU, SPHERE, VOC, AVI, FLV, ASF, AC-3, MPEG streams, and mp3 with
    a Xing or Info header; None for any other file, and for one whose sizes are unknown, as live recordings have them.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    magic = read_at(file, 0, 512)
    if magic[:4] == b"RIFF" and magic[8:12] == b"AVI ":
        return find_avi_truncation(file, num_bytes)
    if magic[:4] in IFF_BYTE_ORDERS:
        return _find_iff_truncation(file, num_bytes, IFF_BYTE_ORDERS[magic[:4]])
    if magic[:4] == b"OggS":
        return _find_ogg_damage(file, num_bytes)
    if magic[4:8] in MP4_BOXES:
        return _find_mp4_truncation(file, num_bytes)
    for start, find in BY_MAGIC:
        if magic.startswith(start):
            return find(file, num_bytes)
    if magic[:3] == b"ID3" or magic[:1] == b"\xff":
        return missing("its audio", read_xing_header(file).end_byte or 0, num_bytes)
    return find_ts_truncation(file, num_bytes) if is_transport_stream(magic) else None


def find_missing_head(file: BinaryIO) -> str | None:
    """Says what a file is that cannot be read because its beginning, or its index, is not there."""
    head = read_at(file, 0, 64)
    advice = (
        "a recorder that sends pieces puts it in the first one alone. Join all pieces, from the first on."
    )
    if is_headless(head):
        return f"it is a piece of WebM without its header: {advice}"
    if head[:4] == b"OggS" and not head[5] & 2:
        return f"it is a piece of Ogg without its header: {advice}"
    if head[4:8] not in MP4_BOXES:
        return None
    kinds = [kind for kind, _ in mp4_boxes(file)]
    if b"moov" in kinds:
        return None
    if b"moof" in kinds or b"styp" in kinds:
        return f"it is a piece of MP4 without its header (moov): {advice}"
    return "it is an MP4 without its index (moov): the recording was not brought to its end. Record or copy it again."


def read_at(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    """Up to so many bytes from a position on, which a header may have made up."""
    if position > MAX_POSITION:
        return b""
    file.seek(position)
    return file.read(num_bytes)


def skip_id3(file: BinaryIO) -> int:
    """Where the audio begins behind ID3 tags, one or several."""
    start = 0
    while len(header := read_at(file, start, 10)) == 10 and header[:3] == b"ID3":
        # 7 bits a byte; bit 4 of the flags: a footer follows
        start += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(header[6:]))
        start += 10 * (header[5] >> 4 & 1)
    return start


def _find_iff_truncation(file: BinaryIO, num_bytes: int, byte_order: str) -> str | None:
    position, long_length = 12, 0
    while len(header := read_at(file, position, 8)) == 8:
        kind, length = struct.unpack(f"{byte_order}4sI", header)
        if kind == b"ds64":  # RF64: 64-bit sizes of the file and of its sample data
            long_length = int.from_bytes(file.read(16)[8:], "little")
        if kind in (b"data", b"SSND"):
            length = long_length or length
            is_known = long_length or 0 < length < UNKNOWN_WAV_BYTES
            return missing("its sample data", position + 8 + length, num_bytes) if is_known else None
        position += 8 + length + length % 2
    return None


def _find_ogg_damage(file: BinaryIO, num_bytes: int) -> str | None:
    position, is_ended = 0, False
    last: dict[bytes, int] = {}  # number of the last page of each stream, from its first with sound on
    while position < num_bytes:
        header = read_at(file, position, 27)
        if header[:4] != b"OggS"[: len(header)]:
            return None if is_ended else f"no Ogg page starts at byte {position}, where one should"
        segments = file.read(header[26]) if len(header) == 27 else b""
        body = file.read(sum(segments))
        if len(header) < 27 or len(segments) < header[26] or len(body) < sum(segments):
            return f"the Ogg page at byte {position} is incomplete"
        page = header[:22] + bytes(4) + header[26:] + segments + body
        if _ogg_checksum(page) != int.from_bytes(header[22:26], "little"):
            return f"the Ogg page at byte {position} does not match its checksum"
        serial, number = header[14:18], int.from_bytes(header[18:22], "little")
        if (num_lost := number - last.get(serial, number) - 1) > 0:
            return f"{num_lost} Ogg pages are missing at byte {position}"
        if header[5] & 2:
            last.pop(serial, None)
        if serial in last or any(header[6:14]):  # a radio station's headers are followed by any later page
            last[serial] = number
        is_ended = bool(header[5] & 4)
        position += len(page)
    return None


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of zlib's polynomial, but starting at 0 and with the most significant bit first."""
    reflected = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _find_mp4_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    for kind, end in mp4_boxes(file):
        if problem := missing(f"its box {kind.decode()!r}", end, num_bytes):
            return problem
    return None


def mp4_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and end of each box of an MP4 file, up to junk or to one that takes the rest."""
    position = 0
    while len(header := read_at(file, position, 16)) >= 8:
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if kind not in MP4_BOXES or length < 8:  # 0: up to the end of the file; else junk after the last box
            return
        position += length
        yield kind, position


class XingHeader(NamedTuple):
    """What the first frame of an mp3 may say of the others. Padding: samples added at both ends together."""

    end_byte: int | None = None
    num_frames: int | None = None
    num_padding: int = 0


def read_xing_header(file: BinaryIO) -> XingHeader:
    """What an mp3 says of itself, if it does."""
    start = skip_id3(file)
    frame = read_at(file, start, 256)
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
