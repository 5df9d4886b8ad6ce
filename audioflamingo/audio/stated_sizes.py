"""Further containers that state how long they are: AU, NIST SPHERE, VOC, AVI, FLV, ASF, AC-3, MPEG streams.

Each function says what is missing of a file that ends before its time; None for a whole one, and for one whose
length is unknown.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

UNKNOWN_BYTES = 0x7FFF0000  # from here on: what a recorder writes that does not know the size yet
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
TS_SYNC = 0x47
TS_TAIL = 20_000  # packets at the end that are looked at
PES_SOUND = frozenset((0xBD, *range(0xC0, 0xE0)))
TS_PACKETS = (188, 192, 204)  # bytes of a packet: plain, with a time code, with parity


def missing(what: str, end: int, num_bytes: int) -> str | None:
    """Says what is missing if something ends behind the end of the file."""
    if end <= num_bytes:
        return None
    return f"{what} ends at byte {end} and the file at byte {num_bytes} ({end - num_bytes} bytes are missing)"


def find_au_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """Sun's and NeXT's `.snd`."""
    offset, length = struct.unpack(">II", _read(file, 4, 8))
    return missing("its sample data", offset + length, num_bytes) if length < UNKNOWN_BYTES else None


def find_sphere_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """NIST SPHERE: a text header, then samples."""
    head = _read(file, 0, 1024)
    lines = head.split(b"\n", 2)
    fields = dict(re.findall(rb"^(\w+) -i (\d+)", head, re.MULTILINE))
    is_plain = b"embedded" not in head
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    if (
        len(lines) < 2
        or not lines[1].strip().isdigit()
        or not is_plain
        or not all(n in fields for n in names)
    ):
        return None
    length = 1
    for name in names:
        length *= int(fields[name])
    return missing("its sample data", int(lines[1]) + length, num_bytes)


def find_voc_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """Creative Voice: blocks, the last of kind 0."""
    position = int.from_bytes(_read(file, 20, 2), "little")
    while position < num_bytes:
        header = _read(file, position, 4)
        if not header[0]:
            return None
        end = position + 4 + int.from_bytes(header[1:], "little")
        if problem := missing("its block", end, num_bytes):
            return problem
        position = end
    return None


def find_avi_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """AVI: one or more RIFF lists, one behind the other."""
    position = 0
    while len(header := _read(file, position, 8)) == 8 and header[:4] == b"RIFF":
        length = int.from_bytes(header[4:], "little")
        if not 0 < length < 0xFFFFFFFF:
            return None
        if problem := missing("its list", position + 8 + length, num_bytes):
            return problem
        position += 8 + length + length % 2
    return None


def find_flv_damage(file: BinaryIO, num_bytes: int) -> str | None:
    """Flash Video: tags, each with its size behind it."""
    position = int.from_bytes(_read(file, 5, 4), "big") + 4
    while position < num_bytes:
        header = _read(file, position, 11)
        end = position + 15 + int.from_bytes(header[1:4], "big")
        if problem := missing("its tag", end, num_bytes):
            return problem
        if header[0] & 0x1F not in (8, 9, 18) or int.from_bytes(_read(file, end - 4, 4), "big") not in (
            end - 4 - position,
            0,
        ):
            return f"no tag of FLV starts at byte {position}, where one should"
        position = end
    return None


def find_asf_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """ASF (WMA, WMV): its header holds the size of the file."""
    head = _read(file, 0, 1 << 16)
    at = head.find(ASF_FILE_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    size, flags = int.from_bytes(head[at + 40 : at + 48], "little"), head[at + 88]
    return None if flags & 1 else missing("its data", size, num_bytes)  # flag 1: a broadcast, of unknown size


def find_ts_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """MPEG transport stream: packets of one size, and in them stretches of sound that state theirs."""
    head = _read(file, 0, 5 * TS_PACKETS[-1])
    for size in TS_PACKETS:
        start = 4 if size == 192 else 0
        if len(head) < 2 * size or any(byte != TS_SYNC for byte in head[start::size]):
            continue
        if num_bytes % size:
            return f"its last packet has {num_bytes % size} of {size} bytes"
        tail_start = max(0, num_bytes // size - TS_TAIL) * size
        file.seek(tail_start)
        tail = file.read(num_bytes - tail_start)
        return _find_open_sound([tail[at + start : at + start + 188] for at in range(0, len(tail), size)])
    return None


def _find_open_sound(packets: list[bytes]) -> str | None:
    """Says whether a stretch of sound is not complete at the end of the packets of a transport stream."""
    left: dict[int, int] = {}  # bytes to come, by stream
    for packet in packets:
        stream = int.from_bytes(packet[1:3], "big") & 0x1FFF
        payload = packet[5 + packet[4] if packet[3] & 0x20 else 4 :] if packet[3] & 0x10 else b""
        if packet[1] & 0x40:
            left.pop(stream, None)
            size = int.from_bytes(payload[4:6], "big")
            if payload[:3] == b"\0\0\1" and len(payload) > 6 and payload[3] in PES_SOUND and size:
                left[stream] = 6 + size
        if stream in left:
            left[stream] -= len(payload)
    num_left = max(left.values(), default=0)
    return f"{num_left} bytes of its last stretch of sound are missing" if num_left > 0 else None


def find_ac3_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """AC-3 and E-AC-3 as plain frames, each of which states its size."""
    position = 0
    while position < num_bytes:
        head = _read(file, position, 6)
        length = _ac3_frame_bytes(head)
        if head[:2] != b"\x0b\x77" or not length:
            return None
        if problem := missing("its last frame", position + length, num_bytes):
            return problem
        position += length
    return None


def _ac3_frame_bytes(head: bytes) -> int:
    """Bytes of a frame, given the first six; 0 if they are none."""
    if head[5] >> 3 > 10:  # E-AC-3
        return 2 * ((int.from_bytes(head[2:4], "big") & 0x7FF) + 1)
    rate, size = head[4] >> 6, head[4] & 63
    if rate == 3 or size >= 2 * len(AC3_KBPS):
        return 0
    kbps = AC3_KBPS[size // 2]
    words = (2 * kbps, kbps * 320 // 147 + size % 2, 3 * kbps)[rate]  # at 48, 44.1 and 32 kHz
    return 2 * words


def find_ps_truncation(file: BinaryIO, num_bytes: int) -> str | None:
    """MPEG program stream (mpg, vob): packs and packets, each with its size."""
    position = 0
    while position < num_bytes:
        head = _read(file, position, 14)
        if head[:3] != b"\0\0\1" or head[3] < 0xB9:
            return None
        if head[3] == 0xBA:
            length = 14 + (head[13] & 7) if head[4] & 0xC0 == 0x40 else 12  # MPEG-2, else MPEG-1
        else:
            length = 4 if head[3] == 0xB9 else 6 + int.from_bytes(head[4:6], "big")
        if problem := missing("its last packet", position + length, num_bytes):
            return problem
        position += length
    return None


def is_transport_stream(head: bytes) -> bool:
    """Whether a file begins as an MPEG transport stream does."""
    return any(
        len(head) > start + size and head[start] == head[start + size] == TS_SYNC
        for size, start in ((188, 0), (192, 4), (204, 0))
    )


def _read(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    """Bytes from a position on; zeros where the file has ended."""
    file.seek(position)
    return file.read(num_bytes).ljust(num_bytes, b"\0") if num_bytes < 1024 else file.read(num_bytes)
