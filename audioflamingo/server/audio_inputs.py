"""Audio that came with a request -> waveforms, within a limit of seconds. Blocking: for worker threads only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from audioflamingo.audio.fetching import FetchPolicy, fetch
from audioflamingo.audio.loading import SAMPLING_RATE, check_waveform, stream_channels
from audioflamingo.audio.reading import Reading
from audioflamingo.audio.sources import decode_data_uri
from audioflamingo.errors import AudioError, AudioTooLongError
from audioflamingo.server.chat_schema import AudioUrlPart, InputAudioPart
from audioflamingo.server.error_replies import bad_request


def decode_base64(text: str, field: str) -> bytes:
    """Bytes of base64 text, with or without a `data:` head.

    Raises:
        ApiError: it is none.
    """
    head = text[: text.find(",") + 1].lower() if text[:5].lower() == "data:" else None
    if head is not None and not head.endswith(";base64,"):
        raise bad_request(f"{field}: a data: address must look like 'data:audio/wav;base64,...'.", field)
    try:
        data = decode_data_uri(text if head else f"data:;base64,{text}")
    except AudioError as error:
        raise bad_request(f"{field}: {error}", field) from None
    if not data:
        raise bad_request(f"{field}: there is no audio in it.", field)
    return data


def limited_audio(data: bytes, max_seconds: float, reading: Reading) -> Iterator[np.ndarray]:
    """Decodes a file block by block, at 16 kHz; its contents say what it is, not its name.

    The limit holds for what comes out, so a small file that unpacks to days of silence ends early.

    Args:
        data: the file.
        max_seconds: the limit.
        reading: which track and channels.

    Yields:
        float32 (channels, samples); one channel unless each is heard.

    Raises:
        AudioTooLongError: more than `max_seconds`.
        AudioError: it cannot be decoded.
    """
    num_samples = 0
    for block in stream_channels(data, reading=reading):
        num_samples += block.shape[1]
        if num_samples > max_seconds * SAMPLING_RATE:
            raise AudioTooLongError(
                f"the audio is longer than the {max_seconds:g} s that are left to this request; send less."
            )
        yield block


def load_clip(
    part: InputAudioPart | AudioUrlPart, field: str, max_seconds: float, policy: FetchPolicy
) -> np.ndarray:
    """A whole clip of a message, float32 (samples,) at 16 kHz; see `limited_audio`.

    Args:
        part: where it is.
        field: what the part is called in messages.
        max_seconds: longest clip.
        policy: what may be fetched.
    """
    url = part.input_audio.data if isinstance(part, InputAudioPart) else part.audio_url.url
    if isinstance(part, InputAudioPart) or url[:5].lower() == "data:":
        data = decode_base64(url, field)
    else:
        data = fetch(url, policy).read()
    waveform = np.concatenate([block[0] for block in limited_audio(data, max_seconds, Reading())])
    check_waveform(waveform, field)
    return waveform
