"""Encoded audio -> blocks of mono float32 samples at the rate of the file, with FFmpeg (through PyAV).

What is damaged or cut short is an error. FFmpeg is forgiving: it plays what is left of a file. So the
container's own claims are checked against what is there, before (`damage.find_damage`: sizes and checksums of
its parts) and after (`_check_length`: seconds of audio). Formats without checksums (mp3, aac, PCM) cannot show
that a byte inside them changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from audioflamingo.audio.damage import find_damage, read_xing_header
from audioflamingo.audio.sources import open_source
from audioflamingo.errors import AudioError, AudioFlamingoError

# FFmpeg's names. A list, because some of its other formats (playlists) open further files and addresses.
CONTAINERS = ("wav", "w64", "aiff", "caf", "flac", "ogg", "mp3", "aac", "amr", "mov", "matroska")
LENGTH_TOLERANCE_S = (
    0.1  # by which a whole mp3 (counted in frames) or WebM may fall short of its stated length
)
BLOCK_SAMPLES = 1 << 15


@dataclass(frozen=True)
class AudioInfo:
    """Claims of a container.

    Attributes:
        container, codec: names that FFmpeg gives them.
        sampling_rate: Hz.
        num_channels: channels.
        duration_s: seconds; None if it does not say.
    """

    container: str
    codec: str
    sampling_rate: int
    num_channels: int
    duration_s: float | None


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
    with _as_audio_error(name, "it cannot be read"):
        if reason := find_damage(file):
            raise AudioError(f"{name} is cut short or damaged: {reason}. Get the whole file.")
        if not file.seek(0, os.SEEK_END):
            raise AudioError(f"{name} is empty (0 bytes). Get the file again.")
        file.seek(0)
    with _as_audio_error(
        name, "it is not audio of a kind that can be read (wav, flac, ogg, mp3, mp4, webm ...)"
    ):
        container = _open_container(file)
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


def _open_container(file: BinaryIO) -> Any:
    import av

    # Only the methods that FFmpeg needs: with a name it would guess the format from the extension.
    reader = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    options = {"format_whitelist": ",".join(CONTAINERS)}
    return av.open(reader, mode="r", metadata_errors="replace", options=options)


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
    if container.format.name == "mp3" and (xing := read_xing_header(file)).num_frames:
        rate = stream.codec_context.sample_rate
        num_samples = xing.num_frames * (1152 if rate >= 32000 else 576) - xing.num_padding
        return num_samples / rate - LENGTH_TOLERANCE_S
    if container.format.name == "matroska,webm":
        hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
        minutes, _, seconds = rest.partition(":")
        with suppress(ValueError):
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - LENGTH_TOLERANCE_S
    return None


def read_audio_info(source: Any) -> AudioInfo | None:
    """Reads the head of a file; None if it cannot be made sense of (decoding then says why)."""
    import av

    try:
        with open_source(source) as (file, _), _open_container(file) as container:
            stream = container.streams.audio[0]
            duration_s = None
            if container.duration:
                duration_s = container.duration / av.time_base
            elif stream.duration and stream.time_base:
                duration_s = float(stream.duration * stream.time_base)
            context = stream.codec_context
            return AudioInfo(
                container.format.name, context.name, context.sample_rate, context.channels, duration_s
            )
    except (AudioFlamingoError, av.error.FFmpegError, OSError, ValueError, IndexError):
        return None
