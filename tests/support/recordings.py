"""Recordings as films, recorders and broadcasts have them, made on the spot: late, with gaps, on several tracks."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE

LOUD = 0.03  # of a tone with a peak of 0.4
PAUSE_SAMPLES = 800  # 50 ms: shorter ones are the zero crossings of a tone
PICTURES_A_SECOND = 10


@dataclass(frozen=True)
class Track:
    """A track of sound: a tone of 440 Hz, a second or more of it.

    Attributes:
        duration_s: seconds of sound.
        start_s: where it starts.
        gap: (seconds of sound before a gap, seconds that the gap lasts).
        keep: which packets are not left out, by their number.
        level: peak; 0 is silence.
        is_default: the flag.
        about: metadata of the track.
    """

    duration_s: float = 2.0
    start_s: float = 0.0
    gap: tuple[float, float] | None = None
    keep: Callable[[int], bool] = lambda number: True
    level: float = 0.4
    is_default: bool = True
    about: tuple[tuple[str, str], ...] = ()


def record(
    container_format: str,
    codec: str,
    rate: int,
    *tracks: Track,
    has_picture: bool = False,
    options: dict[str, str] | None = None,
    first_picture_s: float = 0.0,
) -> bytes:
    """The file of some tracks, by default one."""
    tracks = tracks or (Track(),)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format, options=options or {}) as container:
        packets = []
        if has_picture:
            end_s = max(track.start_s + track.duration_s for track in tracks)
            packets += _picture(container, end_s, first_picture_s)
        streams = [container.add_stream(codec, rate=rate, layout="mono") for _ in tracks]
        for stream, track in zip(streams, tracks, strict=True):
            if codec.startswith("wma"):
                stream.bit_rate = 64000
            stream.metadata.update(dict(track.about))
            if len(tracks) > 1:
                stream.disposition = (
                    av.stream.Disposition.default if track.is_default else av.stream.Disposition(0)
                )
            packets += _sound(stream, rate, track)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            container.mux(packet)
    return buffer.getvalue()


def _sound(stream: Any, rate: int, track: Track) -> list[Any]:
    time = np.arange(round(track.duration_s * rate)) / rate
    samples = (track.level * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
    context = stream.codec_context
    resampler = av.AudioResampler(context.format, "mono", rate, frame_size=context.frame_size or 1024)
    frames = resampler.resample(frame) + resampler.resample(None)
    packets = [packet for part in frames for packet in stream.encode(part)] + stream.encode(None)
    for packet in packets:
        is_behind = track.gap is not None and float(packet.pts * packet.time_base) >= track.gap[0]
        late_s = track.start_s + (track.gap[1] if track.gap is not None and is_behind else 0.0)
        packet.pts += int(late_s / packet.time_base)
        packet.dts = packet.pts
    return [packet for number, packet in enumerate(packets) if track.keep(number)]


def _picture(container: Any, end_s: float, first_s: float) -> list[Any]:
    stream = container.add_stream(
        "flv1" if container.format.name == "flv" else "mpeg4", rate=PICTURES_A_SECOND
    )
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    packets = []
    for number in range(int(first_s * PICTURES_A_SECOND), int(end_s * PICTURES_A_SECOND)):
        image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number % 255, np.uint8), format="rgb24")
        frame = image.reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, PICTURES_A_SECOND)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def heard(waveform: np.ndarray) -> list[tuple[float, float]]:
    """Where a 16 kHz waveform is loud: starts and ends in seconds."""
    loud = np.flatnonzero(np.abs(waveform) > LOUD)
    if not len(loud):
        return []
    breaks = np.flatnonzero(np.diff(loud) > PAUSE_SAMPLES)
    starts, ends = loud[[0, *(breaks + 1)]], loud[[*breaks, -1]]
    return [(start / SAMPLING_RATE, end / SAMPLING_RATE) for start, end in zip(starts, ends, strict=True)]
