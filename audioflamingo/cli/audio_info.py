"""What the container of an audio file says about itself, without decoding it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def read_audio_info(source: Any) -> AudioInfo | None:
    """Reads the head of a file; None if it cannot be made sense of (decoding then says why)."""
    import av

    from audioflamingo.audio.decoding import CONTAINERS
    from audioflamingo.audio.sources import open_source
    from audioflamingo.errors import AudioFlamingoError

    try:
        with open_source(source) as (file, _):
            options = {"format_whitelist": ",".join(CONTAINERS)}
            with av.open(file, mode="r", metadata_errors="replace", options=options) as container:
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
