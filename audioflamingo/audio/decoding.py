"""Encoded audio -> blocks of float32 samples, channel by channel, at the rate of the file, with FFmpeg (through PyAV).

What is damaged or cut short is an error, unless the caller allows it. FFmpeg is forgiving: it plays what is left of
a file. So the container's own claims are checked against what is there, before (`damage.find_damage`: sizes and
checksums of its parts) and after (`_check_length`: seconds of audio). Formats without checksums (mp3, aac, PCM) cannot
show that a byte inside them changed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from audioflamingo.audio.damage import find_damage, find_missing_head, read_xing_header
from audioflamingo.audio.joined_recordings import split_parts
from audioflamingo.audio.lost_audio import Loss
from audioflamingo.audio.reading import Reading
from audioflamingo.audio.sources import is_pipe, open_source
from audioflamingo.audio.timeline import Frame, Timeline, has_clock, silent_frames, zero_of
from audioflamingo.audio.tracks import choose_track, warn_of_others
from audioflamingo.errors import AudioError, AudioFlamingoError, reason_of

# FFmpeg's names. A list, because some of its other formats (playlists) open further files and addresses.
CONTAINERS = (
    *(
        "wav",
        "w64",
        "aiff",
        "caf",
        "au",
        "nistsphere",
        "voc",
        "flac",
        "wv",
        "tta",
        "ogg",
        "mp3",
        "aac",
        "ac3",
        "eac3",
    ),
    *("amr", "mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf"),
)
KINDS = (
    "wav, aiff, au, sph, caf, voc, flac, wv, tta, ogg, opus, mp3, aac, ac3, amr, mp4, m4a, mov, mkv, webm, ts, mpg, "
    "avi, flv, wma"
)
RAW_SUFFIXES = (".pcm", ".raw", ".sln", ".slin", ".s16", ".s16le")
RAW_ADVICE = (
    "it seems to hold samples without a header that says their rate. Pass (rate, samples) with an array, or give it a "
    "header: ffmpeg -f s16le -ar RATE -ac 1 -i FILE out.wav"
)
COUNTED = ("flac", "wv", "tta")  # containers whose headers count the samples
CHECKED_CODECS = ("flac", "tta", "wavpack", "ac3")  # whose frames have checksums
PLAIN_SAMPLES = ("wav", "au", "nistsphere")  # of unknown size, they always end in an incomplete packet
LENGTH_TOLERANCE_S = (
    0.1  # by which a whole mp3 (counted in frames) or WebM may fall short of its stated length
)
COUNTED_TOLERANCE_S = 1e-4  # of a length that is counted in samples
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


def decode_blocks(file: BinaryIO, name: str, reading: Reading) -> Iterator[tuple[int, np.ndarray]]:
    """Decodes one audio track of `file`, of all recordings in it if several were joined.

    Args:
        file: seekable binary file, read from its start.
        name: what messages call it.
        reading: which track, and whether damage is allowed; channels are not looked at.

    Yields:
        `(sampling_rate, block)`: Hz, and float32 samples (channels, n). A block has at most some ten thousand samples,
        so memory does not grow with the file. Both may change from block to block.

    Raises:
        AudioError: no audio in the file, or the file is damaged or cut short.
    """
    with _as_audio_error(name, "it cannot be read"):
        if not file.seek(0, os.SEEK_END):
            raise AudioError(f"{name} is empty (0 bytes). Get the file again.")
        parts = split_parts(file, name)
    for number, part in enumerate(parts):
        decoding = _Decoding(part, name, reading, is_first=number == 0)
        yield from decoding.blocks()


class _Decoding:
    """The decoding of one recording."""

    def __init__(self, file: BinaryIO, name: str, reading: Reading, is_first: bool) -> None:
        self._file = file
        self._name = name
        self._reading = reading
        self._is_first = is_first
        self._loss = Loss(name, reading.allow_damaged)
        self._decoded_s = 0.0
        self._end_s = 0.0  # latest time stamp, in the container's own time

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `decode_blocks`."""
        with _as_audio_error(self._name, "it cannot be read"):
            if reason := find_damage(self._file):
                self._loss.note(reason)
            self._file.seek(0)
        try:
            with _as_audio_error(self._name, f"it is not audio of a kind that can be read ({KINDS})"):
                container = open_container(self._file)
        except AudioError as error:
            raise self._explained(error) from error.__cause__
        with container:
            stream = choose_track(container, self._reading.track, self._name)
            if self._reading.track is None and self._is_first:
                warn_of_others(container, stream, self._name)
            for rate, samples in _join_frames(self._timed(container, stream)):
                # The mean that follows is slow over interleaved channels.
                yield rate, to_float32(np.ascontiguousarray(samples))
            self._finish(container, stream)

    def _explained(self, error: AudioError) -> AudioError:
        self._file.seek(0)
        reason = find_missing_head(self._file)
        if reason is None and self._name.strip("'").lower().endswith(RAW_SUFFIXES):
            reason = RAW_ADVICE
        return error if reason is None else AudioError(f"{self._name} cannot be read: {reason}")

    def _timed(self, container: Any, stream: Any) -> Iterator[Frame]:
        """The frames in their places, where the container has time stamps."""
        kind = container.format.name
        has_lost = kind in COUNTED and self._loss.is_allowed  # their frames are numbered
        if not has_lost and not has_clock(kind, stream.codec_context.name):
            return self._frames(container, stream, fills_gaps=True)
        start_s = (container.start_time or 0) / 1e6
        timeline = Timeline(zero_of(kind, start_s, self._is_first), self._name)
        return timeline.place(self._frames(container, stream, fills_gaps=False))

    def _frames(self, container: Any, stream: Any, fills_gaps: bool) -> Iterator[Frame]:
        """What decodes. What the decoder refuses is damage, except junk behind the last frame or counted sample."""
        from av.error import FFmpegError

        kind = container.format.name
        if stream.codec_context.name in CHECKED_CODECS:
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        failed: list[tuple[Any, FFmpegError]] = []
        last: Frame | None = None
        for packet in self._packets(container, stream):
            if packet.is_corrupt and kind not in PLAIN_SAMPLES:
                self._loss.note(f"a packet at {packet.pos or 0} is incomplete")
            frames: list[Any] = []
            try:
                frames = packet.decode()
            except FFmpegError as error:
                if not self._is_junk(packet, container, stream):
                    failed.append((packet, error))
            if failed and (frames or kind != "mp3"):
                lost_s = self._lose(failed)
                failed.clear()
                if fills_gaps and last is not None:
                    yield from silent_frames(last, lost_s)
            for frame in frames:
                last = Frame(frame.time, frame.sample_rate, _frame_samples(frame))
                self._decoded_s += last.duration_s
                self._end_s = max(self._end_s, (last.time_s or 0.0) + last.duration_s)
                yield last

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        from av.error import FFmpegError

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except (FFmpegError, OSError, ValueError, EOFError) as error:
                self._loss.note(f"at {self._decoded_s:.3f} s reading breaks off ({reason_of(error)})", error)
                return
            if packet is None:
                return
            yield packet

    def _lose(self, failed: list[tuple[Any, Any]]) -> float:
        """Notes packets that do not decode; returns the seconds that they last."""
        lost_s = 0.0
        for packet, error in failed:
            if not self._loss.is_allowed:
                reason = f"at {self._decoded_s:.3f} s a piece of it does not decode ({reason_of(error)})"
                self._loss.note(reason, error)
            duration_s = float((packet.duration or 0) * packet.time_base)
            self._loss.note_packet(packet.size, duration_s)
            lost_s += duration_s
        return lost_s

    def _is_junk(self, packet: Any, container: Any, stream: Any) -> bool:
        """Whether a packet that does not decode is none: FFmpeg makes one of a flac's end that looks like a header.

        It is behind the last sample that the container counts, or, where it counts none (a live stream), has no place.
        """
        if container.format.name not in COUNTED:
            return False
        announced_s, _ = _announced_s(container, stream, self._file)
        if announced_s is None:
            return packet.pts is None
        return self._decoded_s >= announced_s - COUNTED_TOLERANCE_S

    def _finish(self, container: Any, stream: Any) -> None:
        """Compares what was decoded with what the container announces: frames may have been dropped."""
        announced_s, is_end = _announced_s(container, stream, self._file)
        heard_s = self._end_s if is_end and self._end_s else self._decoded_s
        if announced_s is not None and heard_s < announced_s - COUNTED_TOLERANCE_S:
            self._loss.note(f"it announces at least {announced_s:.3f} s of audio, and {heard_s:.3f} s decode")
        self._loss.finish(heard_s, announced_s)


def open_container(file: BinaryIO) -> Any:
    """Opens a seekable file with FFmpeg."""
    import av

    # Only the methods that FFmpeg needs: with a name it would guess the format from the extension.
    file.seek(0)
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
        raise AudioError(
            f"{name}: {what} ({reason_of(error)}). Check the file, or convert it: ffmpeg -i FILE out.wav"
        ) from error


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


def _join_frames(frames: Iterable[Frame]) -> Iterator[tuple[int, np.ndarray]]:
    """Joins frames to blocks of `BLOCK_SAMPLES` or a little more: each later step has a price a block."""
    parts: list[np.ndarray] = []
    rate, num_samples = 0, 0
    for frame in frames:
        is_alike = not parts or (frame.rate == rate and len(frame.samples) == len(parts[0]))
        if not is_alike or num_samples >= BLOCK_SAMPLES:
            yield rate, np.concatenate(parts, axis=1)
            parts, num_samples = [], 0
        parts.append(frame.samples)
        rate = frame.rate
        num_samples += frame.samples.shape[1]
    if parts:
        yield rate, np.concatenate(parts, axis=1)


def _announced_s(container: Any, stream: Any, file: BinaryIO) -> tuple[float | None, bool]:
    """What the container states, where it does so reliably: seconds of audio at least, or (True) where they end."""
    if container.format.name in COUNTED and stream.duration is not None:
        return float(stream.duration * stream.time_base), False
    if container.format.name == "mp3" and (xing := read_xing_header(file)).num_frames:
        rate = stream.codec_context.sample_rate
        num_samples = xing.num_frames * (1152 if rate >= 32000 else 576) - xing.num_padding
        return num_samples / rate - LENGTH_TOLERANCE_S, False
    if container.format.name == "matroska,webm":
        hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
        minutes, _, seconds = rest.partition(":")
        with suppress(ValueError):  # an end on the clock of the time stamps, not a length
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - LENGTH_TOLERANCE_S, True
    return None, False


def read_audio_info(source: Any, track: int | None = None) -> AudioInfo | None:
    """Reads the head of a file; None if it cannot be made sense of (decoding then says why), or is a pipe."""
    import av

    if is_pipe(source):
        return None
    try:
        with warnings.catch_warnings(), open_source(source) as (file, name):
            warnings.simplefilter("ignore")  # decoding gives them
            with open_container(split_parts(file, name)[0]) as container:
                return _info(container, choose_track(container, track, name))
    except (AudioFlamingoError, av.error.FFmpegError, OSError, ValueError):
        return None


def _info(container: Any, stream: Any) -> AudioInfo:
    import av

    duration_s = None
    if container.duration:
        duration_s = container.duration / av.time_base
    elif stream.duration and stream.time_base:
        duration_s = float(stream.duration * stream.time_base)
    context = stream.codec_context
    return AudioInfo(container.format.name, context.name, context.sample_rate, context.channels, duration_s)
