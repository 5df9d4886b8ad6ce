"""Encoded audio -> blocks of mono float32 samples at the rate of the file, with FFmpeg (through PyAV).

What is damaged or cut short is an error. FFmpeg is forgiving: it plays what is left of a file. So the
container's own claims are checked against what is there, before (`find_damage`: sizes and checksums of its
parts) and after (`_check_length`: seconds of audio). Formats without checksums (mp3, aac, PCM) cannot show
that a byte inside them changed.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from audioflamingo.errors import AudioError, MissingDependencyError

# FFmpeg's names. A list, because some of its other formats (playlists) open further files and addresses.
CONTAINERS = ("wav", "w64", "aiff", "caf", "flac", "ogg", "mp3", "aac", "amr", "mov", "matroska")
LENGTH_TOLERANCE_S = (
    0.1  # by which a whole mp3 (counted in frames) or WebM may fall short of its stated length
)
UNKNOWN_WAV_BYTES = 0x7FFF0000  # from here on, and 0: what a recorder writes that does not know the size yet
BLOCK_SAMPLES = 1 << 15
MP4_BOXES = frozenset(
    b"ftyp moov mdat moof free skip wide styp sidx ssix mfra uuid udta meta pdin emsg prft pnot".split()
)
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
EBML_MAGIC = b"\x1a\x45\xdf\xa3"
EBML_SEGMENT = b"\x18\x53\x80\x67"


def to_float32(samples: np.ndarray) -> np.ndarray:
    """Integers of any width are scaled by their full range to [-1, 1); floats keep their values."""
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return samples.astype(np.float32, copy=False)
    half_range = 2.0 ** (8 * samples.dtype.itemsize - 1)
    if samples.dtype.kind == "u":
        return ((samples.astype(np.float64) - half_range) / half_range).astype(np.float32)
    return samples.astype(np.float32) * np.float32(1 / half_range)


def decode_blocks(file: BinaryIO, name: str) -> Iterator[tuple[float, np.ndarray]]:
    """Decodes the first audio stream of `file`.

    Args:
        file: seekable binary file, read from its start.
        name: what error messages call it.

    Yields:
        `(sampling_rate, block)`: Hz, and mono float32 samples (n,), the mean of the channels. A block
        has at most some ten thousand samples, so memory does not grow with the file.

    Raises:
        AudioError: no audio in the file, or the file is damaged or cut short.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("Decoding audio files needs PyAV: pip install av") from error

    with _as_audio_error(name, "it cannot be read"):
        if reason := find_damage(file):
            raise AudioError(f"{name} is cut short or damaged: {reason}. Get the whole file.")
        if not file.seek(0, os.SEEK_END):
            raise AudioError(f"{name} is empty (0 bytes). Get the file again.")
        file.seek(0)
    # Only the methods that FFmpeg needs: with a name it would guess the format from the extension.
    reader = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    options = {"format_whitelist": ",".join(CONTAINERS)}
    with _as_audio_error(
        name, "it is not audio of a kind that can be read (wav, flac, ogg, mp3, mp4, webm ...)"
    ):
        container = av.open(reader, mode="r", metadata_errors="replace", options=options)
    with container:
        stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
        if stream is None:
            kinds = ", ".join(sorted({s.type or "data" for s in container.streams})) or "nothing"
            raise AudioError(
                f"{name} has no audio that can be decoded (it holds: {kinds}). Pass a file with sound."
            )
        decoded_s = 0.0
        for sampling_rate, samples in _join_frames(_decode_frames(container, stream, name)):
            decoded_s += samples.shape[1] / sampling_rate
            samples = np.ascontiguousarray(samples)  # a mean over interleaved channels is slow
            yield sampling_rate, to_float32(samples).mean(axis=0)
        _check_length(_announced_s(container, stream, file), decoded_s, name)


@contextmanager
def _as_audio_error(name: str, what: str) -> Iterator[None]:
    """Turns what FFmpeg or the caller's file object raises into an AudioError."""
    import av

    try:
        yield
    except AudioError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(
            f"{name}: {what} ({reason}). Check the file, or convert it: ffmpeg -i FILE out.wav"
        ) from error


def _decode_frames(container: Any, stream: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Rate and samples (channels, n) of each frame, as `_frame_samples` gives them.

    What the decoder refuses is an error, except junk after the last frame of an mp3.
    """
    from av.error import FFmpegError

    if stream.codec_context.name == "flac":
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    damage: FFmpegError | None = None
    with _as_audio_error(name, "it is cut short or damaged"):
        for packet in container.demux(stream):
            # A WAV of unknown size always ends in an incomplete packet.
            if packet.is_corrupt and container.format.name != "wav":
                raise AudioError(f"{name} is cut short: a packet is incomplete. Get the whole file.")
            try:
                frames = packet.decode()
            except FFmpegError as error:
                if container.format.name != "mp3":
                    raise
                damage = damage or error
                continue
            if frames and damage is not None:
                raise damage
            for frame in frames:
                yield frame.sample_rate, _frame_samples(frame)


def _frame_samples(frame: Any) -> np.ndarray:
    """Samples (channels, n) of a frame, in its own number format (float32 from 8 planes on)."""
    import av

    num_channels = frame.layout.nb_channels
    if not frame.format.is_planar:
        return frame.to_ndarray().reshape(-1, num_channels).T
    if num_channels < 8:
        return frame.to_ndarray()
    # PyAV (18.1) would read beyond the last plane.
    resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
    return np.concatenate([_frame_samples(packed) for packed in resampler.resample(frame)], axis=1)


def _join_frames(frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Joins frames to blocks of `BLOCK_SAMPLES` or a little more: each later step has a price a block."""
    parts: list[np.ndarray] = []
    rate, num_samples = 0, 0
    for frame_rate, samples in frames:
        is_alike = not parts or (frame_rate == rate and len(samples) == len(parts[0]))
        if not is_alike or num_samples >= BLOCK_SAMPLES:
            yield rate, np.concatenate(parts, axis=1)
            parts, num_samples = [], 0
        parts.append(samples)
        rate = frame_rate
        num_samples += samples.shape[1]
    if parts:
        yield rate, np.concatenate(parts, axis=1)


def _check_length(announced_s: float | None, decoded_s: float, name: str) -> None:
    """Raises an AudioError if less decodes than the container announces: frames were dropped."""
    if announced_s is not None and decoded_s < announced_s - 1e-4:
        raise AudioError(
            f"{name} is cut short or damaged: it announces at least {announced_s:.3f} s of audio, and "
            f"{decoded_s:.3f} s decode. Get the whole file."
        )


def _announced_s(container: Any, stream: Any, file: BinaryIO) -> float | None:
    """Seconds of audio that the container states at least, where it states them reliably."""
    if container.format.name == "flac" and stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.format.name == "mp3" and (xing := _read_xing_header(file)).num_frames:
        rate = stream.codec_context.sample_rate
        num_samples = xing.num_frames * (1152 if rate >= 32000 else 576) - xing.num_padding
        return num_samples / rate - LENGTH_TOLERANCE_S
    if container.format.name == "matroska,webm":
        hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
        minutes, _, seconds = rest.partition(":")
        with suppress(ValueError):
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - LENGTH_TOLERANCE_S
    return None


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
        return _missing("its audio", _read_xing_header(file).end_byte or 0, num_bytes)
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
        if (
            kind not in MP4_BOXES or length < 8
        ):  # 0: up to the end of the file; otherwise junk after the last box
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


def _read_xing_header(file: BinaryIO) -> XingHeader:
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
