"""Sound that arrives piece by piece without a file around it: raw bytes -> float32 at 16 kHz."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from audioflamingo.audio.loading import SAMPLING_RATE, Resampler
from audioflamingo.errors import AudioError
from audioflamingo.fields import check_value

Encoding = Literal["pcm16", "ulaw", "alaw"]
BYTES_A_SAMPLE: dict[str, int] = {"pcm16": 2, "ulaw": 1, "alaw": 1}


class LiveAudio:
    """One mono stream.

    Args:
        encoding: "pcm16" (signed, little-endian), "ulaw" or "alaw" (G.711).
        rate: Hz of the samples that come.

    Raises:
        ArgumentError: an encoding that does not exist.
    """

    def __init__(self, encoding: Encoding, rate: float) -> None:
        allowed = get_args(Encoding)
        check_value(encoding in allowed, "encoding", encoding, f"one of {', '.join(allowed)}")
        self._encoding = encoding
        self._rate = rate
        self._resampler = Resampler(rate, SAMPLING_RATE, 1)

    def duration_s(self, num_bytes: int) -> float:
        """Seconds that so many bytes last."""
        return num_bytes / BYTES_A_SAMPLE[self._encoding] / self._rate

    def put(self, data: bytes) -> np.ndarray:
        """Takes bytes of whole samples; gives what is ready at 16 kHz, float32 (n,).

        Raises:
            AudioError: half a sample.
        """
        if self._encoding == "pcm16":
            if len(data) % 2:
                raise AudioError(f"pcm16 has two bytes a sample; {len(data)} bytes are an odd number.")
            samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        else:
            samples = g711_table(self._encoding)[np.frombuffer(data, np.uint8)]
        return self._resampler.put(samples[None])[0]

    def end(self) -> np.ndarray:
        """What the resampler held back; a new stream may begin behind it."""
        tail = self._resampler.end()[0]
        self._resampler = Resampler(self._rate, SAMPLING_RATE, 1)
        return tail


@lru_cache
def g711_table(law: Literal["ulaw", "alaw"]) -> np.ndarray:
    """The sample that each of the 256 codes stands for, float32 in [-1, 1]. ITU-T G.711, decoded by FFmpeg."""
    import av

    codec = av.CodecContext.create({"ulaw": "pcm_mulaw", "alaw": "pcm_alaw"}[law], "r")
    codec.sample_rate, codec.layout = 8000, "mono"  # type: ignore[attr-defined]
    (frame,) = codec.decode(av.Packet(bytes(range(256))))  # type: ignore[attr-defined]
    return frame.to_ndarray()[0].astype(np.float32) / 32768
