"""Audio of any kind -> waveform: mono float32 at 16 kHz, and its cut into 30-second windows.

The front end's first half (Audio Flamingo 3, section 3.1; Whisper's). The second half, waveform -> log-mel,
is in `features.py`. Left out on purpose: peak normalisation and voice detection, which the model was not
trained with.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from audioflamingo.audio.decoding import decode_blocks, to_float32
from audioflamingo.audio.forms import unwrap
from audioflamingo.audio.mixing import Mixer
from audioflamingo.audio.reading import ChannelChoice, Reading
from audioflamingo.audio.sources import open_source
from audioflamingo.audio.stored import StoredAudio
from audioflamingo.config import CHUNK_LENGTH_S
from audioflamingo.errors import (
    ArgumentError,
    AudioError,
    AudioFlamingoWarning,
    AudioTooLongError,
    warn,
)

SAMPLING_RATE = 16000  # Hz
N_FFT = 400  # samples: 25 ms
HOP_LENGTH = 160  # samples: 10 ms, one frame
N_SAMPLES = CHUNK_LENGTH_S * SAMPLING_RATE  # 480000 samples a window
N_FRAMES = N_SAMPLES // HOP_LENGTH  # 3000 mel frames a window
MAX_AUDIO_S = 600  # the longest clip that the model was trained for
MAX_WINDOWS = MAX_AUDIO_S // CHUNK_LENGTH_S  # 20
MIN_FRAMES = 3  # fewer give no audio token
MIN_SAMPLES = (MIN_FRAMES - 1) * HOP_LENGTH + 1  # 321 samples: 20 ms

MIN_SAMPLING_RATE = 1000  # Hz; below it, resampling would turn a small file into gigabytes
MAX_SAMPLING_RATE = 10_000_000
LOUD_PEAK = 4.0  # float samples beyond +-1 by this much were not scaled to [-1, 1]
LARGEST_PEAK = 1e12  # beyond every integer format; the power of samples beyond 1e16 would leave float32
USUAL_CHANNELS = 2  # of an array; more are likelier a batch of clips
FAINT_PEAK = 1 << 16  # 32-bit samples that stay below this were recorded with 16
ARRAY_BLOCK = 1 << 18  # samples of an array that are resampled at once

Frames = TypeVar("Frames", int, torch.Tensor)


def conv_length(num_frames: Frames) -> Frames:
    """Encoder positions (20 ms) of `num_frames` mel frames (10 ms): what the stride-2 convolution leaves."""
    return (num_frames - 1) // 2 + 1


def num_audio_tokens(num_frames: Frames) -> Frames:
    """Audio tokens (40 ms) of `num_frames` mel frames; 0 for fewer than `MIN_FRAMES`. Rounds down."""
    return (conv_length(num_frames) - 2) // 2 + 1


def load_audio(
    source: Any,
    *,
    sampling_rate: float | None = None,
    target_rate: float = SAMPLING_RATE,
    track: int | None = Reading.track,
    channel: ChannelChoice = Reading.channel,
    allow_damaged: bool = Reading.allow_damaged,
) -> np.ndarray:
    """Reads audio from anywhere as one mono waveform.

    Channels are averaged and the rate is converted with soxr (quality HQ): for lossless files the samples and
    their number are those of `librosa.load(path, sr=target_rate)`. Where the mean would cancel the channels, the
    stronger one is taken, with a warning. A sample's place is its time in the container: a late start and gaps are
    silence.

    Args:
        source: a path (`str` or `os.PathLike`; `~` is the home folder), an http(s) URL, a `data:` URI, bytes,
            a binary file object, a `StoredAudio` (a part of a file), a NumPy array or a torch tensor; or any of
            these as other libraries hand them over (a row of `datasets`, an `AudioDecoder`, a rate and samples), see
            `audio.forms`. Arrays are (samples,) or two-dimensional with channels on the shorter axis; integers are
            scaled by their full range, floats are taken as they are.
        sampling_rate: Hz of an array or tensor (default: `target_rate`). A file states its own: leave it out.
        target_rate: Hz of the result.
        track: which audio track of a file, counted from 1; by default the one that it marks as its default.
        channel: "mix", "left" or "right".
        allow_damaged: take what is left of a file that is damaged or cut short; a warning states what was lost.

    Returns:
        float32 waveform (samples,), always a new array.

    Raises:
        AudioError: the source cannot be read or decoded, is cut short, has no samples or has NaN or infinite
            ones.
        ArgumentError: an argument of the wrong type, or `sampling_rate` given for encoded audio.
    """
    reading = Reading(track, channel, allow_damaged)
    blocks = stream_audio(source, sampling_rate=sampling_rate, target_rate=target_rate, reading=reading)
    return np.concatenate(list(blocks))


def stream_audio(
    source: Any,
    *,
    sampling_rate: float | None = None,
    target_rate: float = SAMPLING_RATE,
    reading: Reading | None = None,
) -> Iterator[np.ndarray]:
    """Like `load_audio`, in blocks: memory does not grow with the length of a file.

    The blocks, joined, are exactly what `load_audio` returns. Errors come while iterating: those that only
    the end of a file shows (cut short, NaN count) after the last block.

    Args:
        source: see `load_audio`.
        sampling_rate: likewise.
        target_rate: likewise.
        reading: track, channel, and whether damage is allowed.

    Yields:
        float32 blocks (samples,) of varying length, never empty. A block may share memory with an array
        source.
    """
    reading = reading or Reading()
    reading.check_one()
    blocks = stream_channels(source, sampling_rate=sampling_rate, target_rate=target_rate, reading=reading)
    return (block[0] for block in blocks)


def stream_channels(
    source: Any,
    *,
    sampling_rate: float | None = None,
    target_rate: float = SAMPLING_RATE,
    reading: Reading,
) -> Iterator[np.ndarray]:
    """Like `stream_audio`, with an axis for the channels that are heard: one, or all of them with `channel="each"`.

    Yields:
        float32 blocks (channels, samples).
    """
    target_rate = _check_rate(target_rate, "target_rate")
    source, sampling_rate = unwrap(source, sampling_rate)
    if isinstance(source, StoredAudio):
        whole = stream_channels(
            source.source(), sampling_rate=sampling_rate, target_rate=target_rate, reading=reading
        )
        yield from source.cut(whole, target_rate)
        return
    if isinstance(source, np.ndarray | torch.Tensor):
        if reading.track is not None:
            raise ArgumentError(f"track={reading.track} was given for an array, which has no tracks.")
        rate = target_rate if sampling_rate is None else _check_rate(sampling_rate, "sampling_rate")
        name = f"audio array of shape {tuple(source.shape)} and dtype {source.dtype}"
        mixed = _mix(_array_blocks(source, rate, name), reading, name)
        yield from _resample(_check_samples(mixed, name), target_rate, name)
        return
    if sampling_rate is not None:
        raise ArgumentError(
            f"sampling_rate={sampling_rate!r} was given for encoded audio ({type(source).__name__}), which "
            "states its own. Leave sampling_rate out; it is for NumPy arrays and torch tensors."
        )
    with open_source(source) as (file, name):
        mixed = _mix(decode_blocks(file, name, reading), reading, name)
        yield from _resample(_check_samples(mixed, name), target_rate, name)


def _mix(
    blocks: Iterable[tuple[float, np.ndarray]], reading: Reading, name: str
) -> Iterator[tuple[float, np.ndarray]]:
    """The channels (heard, n) of blocks (channels, n)."""
    mixer = Mixer(reading.channel, name)
    for rate, block in blocks:
        yield rate, mixer.mix(block, rate)
    mixer.finish()


def _check_rate(rate: Any, argument: str) -> float:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise ArgumentError(f"{argument} must be a number in Hz, not {rate!r} of type {type(rate).__name__}.")
    rate = float(rate)
    if not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
        raise AudioError(
            f"{argument}: {rate:g} Hz is not a usable sampling rate. It must lie between {MIN_SAMPLING_RATE} "
            f"and {MAX_SAMPLING_RATE} Hz; state the rate at which the audio was recorded."
        )
    return rate


def _array_blocks(
    source: np.ndarray | torch.Tensor, rate: float, name: str
) -> Iterator[tuple[float, np.ndarray]]:
    waveform = _float_channels(_as_numpy(source, name), name)
    for start in range(0, waveform.shape[1], ARRAY_BLOCK):
        yield rate, waveform[:, start : start + ARRAY_BLOCK]


def _as_numpy(source: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    if source.layout != torch.strided or source.device.type == "meta":
        raise AudioError(
            f"{name} holds no samples (layout {source.layout}, device {source.device}). Pass a dense one."
        )
    source = source.detach()
    if source.is_floating_point():
        source = source.float()  # NumPy has no bfloat16
    return source.cpu().numpy()


def _float_channels(array: np.ndarray, name: str) -> np.ndarray:
    """float32 (channels, samples) of an array of samples, or of channels and samples."""
    if array.dtype.kind not in "fiu":
        raise AudioError(
            f"{name}: samples must be real numbers. Convert them to float32 in [-1, 1] or to int16."
        )
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        raise AudioError(
            f"{name}: 64-bit integers are no audio format, so their scale is unknown. Convert them to the "
            "width they were recorded with (.astype(numpy.int16) or int32), or to float32 in [-1, 1]."
        )
    if array.dtype.kind in "iu" and array.dtype.itemsize == 4 and 0 < _peak(array) < FAINT_PEAK:
        warnings.warn(
            f"{name}: the largest sample is {_peak(array)} of {2**31}, nearly silence. If these are 16-bit samples in "
            "a wider type, convert them first (.astype(numpy.int16)).",
            AudioFlamingoWarning,
            stacklevel=2,
        )
    if array.ndim == 1:
        return to_float32(array)[None]
    if array.ndim != 2:
        raise AudioError(
            f"{name}: audio has one dimension (samples) or two (channels and samples). Pass one clip."
        )
    if array.shape[0] == array.shape[1] and array.size > 1:
        raise AudioError(
            f"{name}: with equal axes it is unclear which are the channels. Pass a mono waveform."
        )
    if not array.size:
        return np.zeros((1, 0), np.float32)
    if min(array.shape) > USUAL_CHANNELS:
        warn(
            f"{name}: this is heard as one clip of {min(array.shape)} channels, which are averaged. Several clips "
            "are a list of arrays: list(array)."
        )
    return to_float32(array if array.shape[0] < array.shape[1] else array.T)


def _peak(array: np.ndarray) -> int:
    offset = 2**31 if array.dtype.kind == "u" else 0
    return int(np.abs(array.astype(np.int64) - offset).max(initial=0))


def _check_samples(
    blocks: Iterable[tuple[float, np.ndarray]], name: str
) -> Iterator[tuple[float, np.ndarray]]:
    """Passes blocks on until one holds NaN or infinity: then counts those of the whole clip and raises."""
    num_samples, num_bad, first_bad, peak, rate = 0, 0, 0, 0.0, 1.0
    for rate, block in blocks:
        block_peak = float(np.abs(block).max(initial=0.0))
        if not math.isfinite(block_peak):
            bad = np.flatnonzero(~np.isfinite(block).all(axis=0))
            first_bad = first_bad if num_bad else num_samples + int(bad[0])
            num_bad += len(bad)
        num_samples += block.shape[1]
        if not num_bad:
            peak = max(peak, block_peak)
            yield rate, block
    if num_bad:
        raise AudioError(
            f"{name}: {num_bad} of {num_samples} samples are NaN or infinite (in float32), the first is "
            f"sample {first_bad} at {first_bad / rate:.3f} s. Repair or cut them."
        )
    if peak > LARGEST_PEAK:
        raise AudioError(
            f"{name}: float samples reach {peak:.3g}, but [-1, 1] is full scale: this is damaged, or no audio."
        )
    if peak > LOUD_PEAK:
        warnings.warn(
            f"{name}: float samples reach {peak:.6g}, but [-1, 1] is full scale. They are used as they are; "
            "if they are integers in disguise, divide them by their full range (32768 for 16 bit).",
            AudioFlamingoWarning,
            stacklevel=2,
        )


def _resample(
    blocks: Iterable[tuple[float, np.ndarray]], target_rate: float, name: str
) -> Iterator[np.ndarray]:
    """Converts blocks (channels, n) to `target_rate`; `ceil(n * target_rate / rate)` samples in all, as librosa gives.

    Where the rate changes (recordings that were joined), one conversion ends and the next begins.
    """
    resampler: Resampler | None = None
    num_out = 0
    for rate, block in blocks:
        if resampler is not None and (resampler.rate, resampler.num_channels) != (rate, len(block)):
            if resampler.rate != rate:
                warn(
                    f"{name}: the sampling rate changes from {resampler.rate:g} to {rate:g} Hz at "
                    f"{num_out / target_rate:.1f} s; both are converted."
                )
            tail = resampler.end()
            num_out += tail.shape[1]
            if tail.size:
                yield tail
            resampler = None
        if resampler is None:
            rate = _check_rate(rate, f"{name}, sampling rate")
            resampler = Resampler(rate, target_rate, len(block))
        block = resampler.put(block)
        num_out += block.shape[1]
        if block.size:
            yield block
    if resampler is None or not num_out + resampler.num_in:
        raise AudioError(
            f"{name} has a length of zero samples. Pass audio of at least {MIN_SAMPLES / SAMPLING_RATE} s."
        )
    if (tail := resampler.end()).size:
        yield tail


class Resampler:
    """Converts the blocks of channels from one rate to another.

    Attributes:
        num_in: samples of a channel that were put in so far.
    """

    def __init__(self, rate: float, target_rate: float, num_channels: int) -> None:
        import soxr

        self.rate = rate
        self.num_channels = num_channels
        self.num_in = self._num_out = 0
        self._ratio = target_rate / rate
        self._streams: list[Any] = []
        if rate != target_rate:
            kind = {"num_channels": 1, "dtype": "float32", "quality": "HQ"}
            self._streams = [soxr.ResampleStream(rate, target_rate, **kind) for _ in range(num_channels)]

    def put(self, block: np.ndarray) -> np.ndarray:
        """Takes samples (channels, n), gives those that are ready."""
        self.num_in += block.shape[1]
        if self._streams:
            block = self._run(block, is_last=False)
        self._num_out += block.shape[1]
        return block

    def end(self) -> np.ndarray:
        """The samples that are left, so that there are `ceil(num_in * target_rate / rate)` in all."""
        if not self._streams:
            return np.zeros((self.num_channels, 0), np.float32)
        tail = self._run(np.zeros((self.num_channels, 0), np.float32), is_last=True)
        num_left = max(0, math.ceil(self.num_in * self._ratio) - self._num_out)
        return np.pad(tail[:, :num_left], ((0, 0), (0, max(0, num_left - tail.shape[1]))))

    def _run(self, block: np.ndarray, is_last: bool) -> np.ndarray:
        pairs = zip(self._streams, block, strict=True)
        return np.stack([stream.resample_chunk(row, last=is_last) for stream, row in pairs])


def check_waveform(waveform: np.ndarray, name: str = "audio") -> None:
    """Checks that a 16 kHz waveform (samples,) is long enough to give at least one audio token.

    Raises:
        AudioError: fewer than `MIN_SAMPLES` samples, or not one-dimensional.
    """
    if waveform.ndim != 1:
        raise AudioError(f"{name} has shape {waveform.shape}; a waveform has one dimension. Use load_audio.")
    if len(waveform) < MIN_SAMPLES:
        raise AudioError(
            f"{name} lasts {len(waveform) / SAMPLING_RATE:.4f} s ({len(waveform)} samples at {SAMPLING_RATE} "
            f"Hz), too short for one audio token. Pass at least {MIN_SAMPLES / SAMPLING_RATE:.4f} s "
            f"({MIN_SAMPLES} samples)."
        )


def split_windows(
    waveform: np.ndarray,
    *,
    on_long: str = "truncate",
    max_windows: int = MAX_WINDOWS,
    window_samples: int = N_SAMPLES,
    name: str = "audio",
) -> list[np.ndarray]:
    """Cuts a 16 kHz waveform into windows of `CHUNK_LENGTH_S`, the last one shorter.

    Args:
        waveform: (samples,), at least one sample.
        on_long: for a clip of more than `max_windows`, `"truncate"` keeps its start with a warning that
            states the seconds lost, `"error"` raises.
        max_windows: the longest clip, in windows.
        window_samples: samples in a window.
        name: what messages call the clip.

    Returns:
        1 to `max_windows` views of the waveform.

    Raises:
        AudioTooLongError: too long, with `on_long="error"`.
        ArgumentError: another value of `on_long`.
    """
    if on_long not in ("truncate", "error"):
        raise ArgumentError(f"on_long={on_long!r} is not understood; it must be 'truncate' or 'error'.")
    if max_windows < 1:
        raise ArgumentError(f"max_windows={max_windows!r} must be at least 1.")
    max_samples = max_windows * window_samples
    if len(waveform) > max_samples:
        length_s, kept_s = len(waveform) / SAMPLING_RATE, max_samples / SAMPLING_RATE
        if on_long == "error":
            raise AudioTooLongError(
                f"{name} lasts {length_s:.2f} s; at most {kept_s:.2f} s fit. Cut or split it (it is "
                f"{length_s - kept_s:.2f} s too long), or allow truncation with on_long='truncate'."
            )
        warnings.warn(
            f"{name} lasts {length_s:.2f} s: the first {kept_s:.2f} s are kept and the last "
            f"{length_s - kept_s:.2f} s are lost. Pass on_long='error' to refuse such clips, or split them.",
            AudioFlamingoWarning,
            stacklevel=2,
        )
    return [
        waveform[i : i + window_samples] for i in range(0, min(len(waveform), max_samples), window_samples)
    ]
