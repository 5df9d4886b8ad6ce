"""Matroska and WebM (RFC 8794, RFC 9559): is every element there, down to the blocks?

FFmpeg passes over what it cannot make sense of and goes on at the next cluster. So the elements are counted through
here: each starts where the one before ends, and the last one ends with the file.
"""

from __future__ import annotations

from typing import BinaryIO

EBML = 0x1A45DFA3
SEGMENT = 0x18538067
CLUSTER = 0x1F43B675
TOP = frozenset({EBML, SEGMENT})
VOIDS = frozenset({0xEC, 0xBF})  # filling and checksums stand anywhere
IN_SEGMENT = frozenset(
    {0x114D9B74, 0x1549A966, 0x1654AE6B, CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
)
IN_CLUSTER = frozenset({0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF})
BLOCKS = (0xE7, 0xA3, 0xA0)  # what a piece of a recording may begin with


def find_matroska_damage(file: BinaryIO, num_bytes: int) -> str | None:
    """Says where a Matroska file is cut off or not what it should be; None for a whole one."""
    return _Walk(file, num_bytes).find_damage()


def is_headless(head: bytes) -> bool:
    """Whether a file begins as a later piece of a WebM recording does, without the header."""
    if head[:4] == CLUSTER.to_bytes(4, "big"):
        return True
    if not head or head[0] not in BLOCKS or len(head) < 9:
        return False
    size, width = _size(head[1:9])
    return size is not None and 4 < size < 1 << 20 and bool(head[1 + width] & 0x80)  # a small track number


class _Walk:
    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self._segment_end: int | None = None
        self._cluster_end: int | None = None
        self._is_in_cluster = False

    def find_damage(self) -> str | None:
        position = 0
        while position < self._num_bytes:
            self._leave(position)
            kind, size, start = self._read(position)
            if not self._is_allowed(kind):
                if self._segment_end is not None and position >= self._segment_end:
                    return None  # filling behind the end
                return f"no element of Matroska starts at byte {position}, where one should"
            end = None if size is None else start + size
            if kind == SEGMENT:
                self._segment_end, self._is_in_cluster = end, False
                if end is not None and end > self._num_bytes:
                    return f"its segment ends at byte {end} and the file at byte {self._num_bytes}"
            elif kind == CLUSTER:
                self._cluster_end, self._is_in_cluster = end, True
            if kind in (SEGMENT, CLUSTER):
                position = start
                continue
            if end is None:
                return None  # of unknown size, and not known how to read
            if end > self._num_bytes:
                return f"its element at byte {position} ends at byte {end} and the file at byte {self._num_bytes}"
            if kind in IN_SEGMENT | TOP:
                self._is_in_cluster = False
            position = end
        return None

    def _leave(self, position: int) -> None:
        if self._is_in_cluster and self._cluster_end is not None and position >= self._cluster_end:
            self._is_in_cluster = False

    def _is_allowed(self, kind: int) -> bool:
        if kind in VOIDS or kind in IN_SEGMENT or kind in TOP:
            is_inside = self._is_in_cluster and self._cluster_end is not None
            return kind in VOIDS or not is_inside
        if self._is_in_cluster:
            return kind in IN_CLUSTER
        return False

    def _read(self, position: int) -> tuple[int, int | None, int]:
        """An element: (id, 0 for none; size or None if unknown; where its content starts)."""
        self._file.seek(position)
        raw = self._file.read(12)
        if not raw or raw[0] < 0x10:
            return 0, None, position
        width = 9 - raw[0].bit_length()
        size, size_width = _size(raw[width : width + 8])
        return int.from_bytes(raw[:width], "big"), size, position + width + size_width


def _size(raw: bytes) -> tuple[int | None, int]:
    """A variable-length size: (value or None if unknown, its width)."""
    if not raw or not raw[0]:
        return None, len(raw[:1])
    width = 9 - raw[0].bit_length()
    mask = (1 << 7 * width) - 1
    size = int.from_bytes(raw[:width], "big") & mask
    return (None if size == mask or len(raw) < width else size), width
