"""Audio for tests, made on the spot: a tone, and the tone as a file of each kind."""

from __future__ import annotations

import io

import av
import numpy as np
import soundfile

# name -> (soundfile format, subtype) or (FFmpeg container, codec)
SOUNDFILE_KINDS = {
    "wav": ("WAV", "PCM_16"),
    "wav24": ("WAV", "PCM_24"),
    "wav_u8": ("WAV", "PCM_U8"),
    "wav_float": ("WAV", "FLOAT"),
    "wav_double": ("WAV", "DOUBLE"),
    "rf64": ("RF64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "flac24": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", None),
}
FFMPEG_KINDS = {
    "opus": ("ogg", "libopus"),
    "webm": ("webm", "libopus"),
    "m4a": ("ipod", "aac"),
    "mp4": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "mp3_lavf": ("mp3", "libmp3lame"),
}
KINDS = (*SOUNDFILE_KINDS, *FFMPEG_KINDS)


def tone(duration_s: float = 1.0, rate: int = 16000, channels: int = 1, noise: float = 0.0) -> np.ndarray:
    """float32 (samples, channels): a rising tone for each channel, peak 0.4 (without noise)."""
    time = np.arange(round(duration_s * rate)) / rate
    waves = [0.4 * np.sin(2 * np.pi * (300 + 150 * c + 40 * time) * time) for c in range(channels)]
    waveform = np.stack(waves, axis=1) + noise * np.random.default_rng(0).standard_normal(
        (len(time), channels)
    )
    return waveform.astype(np.float32)


def encode(waveform: np.ndarray, rate: int, kind: str) -> bytes:
    """The file of a waveform (samples, channels)."""
    buffer = io.BytesIO()
    if kind in SOUNDFILE_KINDS:
        file_format, subtype = SOUNDFILE_KINDS[kind]
        soundfile.write(buffer, waveform, rate, format=file_format, subtype=subtype)
        return buffer.getvalue()
    container_format, codec = FFMPEG_KINDS[kind]
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[waveform.shape[1]]
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(waveform.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


def encode_video() -> bytes:
    """An MP4 file that has a picture and no sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()
