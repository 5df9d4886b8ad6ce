"""Changes of waveforms and features that keep their meaning. All chance comes from the generator that is passed in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from audioflamingo.audio.loading import HOP_LENGTH, MIN_SAMPLES, SAMPLING_RATE, load_audio
from audioflamingo.config import AUDIO_TOKENS_PER_S
from audioflamingo.errors import AudioError, ConfigError
from audioflamingo.training.training_config import AugmentationConfig, SpecAugmentConfig

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")
FRAMES_PER_S = SAMPLING_RATE // HOP_LENGTH


def augment_waveform(
    waveform: np.ndarray, config: AugmentationConfig, rng: np.random.Generator
) -> np.ndarray:
    """Applies each change with its probability.

    Args:
        waveform: float32 (samples,) at 16 kHz; unchanged.
        config: probabilities and ranges.
        rng: the source of chance.

    Returns:
        float32 (samples,); speed changes their number.
    """
    if rng.random() < config.speed_probability:
        waveform = change_speed(waveform, rng.uniform(*config.speed))
    if rng.random() < config.reverb_probability:
        waveform = add_reverb(waveform, rng.uniform(*config.reverb_s), rng)
    if rng.random() < config.noise_probability:
        assert config.noise_folder is not None
        beds = noise_files(config.noise_folder)
        noise = _load_bed(beds[int(rng.integers(len(beds)))])
        waveform = mix_noise(waveform, noise, rng.uniform(*config.noise_snr_db), rng)
    if rng.random() < config.band_probability:
        waveform = limit_band(waveform, rng.uniform(*config.band_hz))
    if rng.random() < config.gain_probability:
        waveform = waveform * np.float32(10 ** (rng.uniform(*config.gain_db) / 20))
    peak = float(np.abs(waveform).max(initial=0.0))
    return (waveform / peak if peak > 1 else waveform).astype(np.float32)


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Plays `factor` times as fast; the pitch rises with it. A clip never becomes too short to encode."""
    import soxr

    changed = np.asarray(
        soxr.resample(waveform, SAMPLING_RATE * factor, SAMPLING_RATE, quality="MQ"), np.float32
    )
    return changed if len(changed) >= MIN_SAMPLES else waveform


def limit_band(waveform: np.ndarray, upper_hz: float) -> np.ndarray:
    """Removes what lies above `upper_hz`, as a recording at a lower rate does."""
    import soxr

    rate = min(2 * upper_hz, SAMPLING_RATE)
    low = soxr.resample(waveform, SAMPLING_RATE, rate, quality="MQ")
    back = np.asarray(soxr.resample(low, rate, SAMPLING_RATE, quality="MQ"), np.float32)[: len(waveform)]
    return np.pad(back, (0, len(waveform) - len(back)))


def add_reverb(waveform: np.ndarray, decay_s: float, rng: np.random.Generator) -> np.ndarray:
    """Convolves with the direct sound and exponentially decaying noise; same length, same energy.

    Args:
        waveform: (samples,).
        decay_s: time in which the noise falls by 60 dB.
        rng: the noise.
    """
    num_samples = int(decay_s * SAMPLING_RATE)
    envelope = 10 ** (-3 * np.arange(num_samples) / num_samples)
    response = rng.standard_normal(num_samples) * envelope
    response *= rng.uniform(0.2, 0.8) / np.linalg.norm(response)
    response[0] = 1.0
    size = 1 << (len(waveform) + num_samples - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(response, size), size)[: len(waveform)]
    energy = float(np.square(wet).sum())
    scale = np.sqrt(float(np.square(waveform, dtype=np.float64).sum()) / energy) if energy > 0 else 1.0
    return (wet * scale).astype(np.float32)


def mix_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds a random stretch of `noise`, repeated if it is short, at a signal-to-noise ratio."""
    repeated = np.tile(noise, -(-len(waveform) // len(noise)) + 1)
    start = int(rng.integers(len(noise)))
    stretch = repeated[start : start + len(waveform)]
    signal_power, noise_power = (float(np.mean(np.square(x, dtype=np.float64))) for x in (waveform, stretch))
    if signal_power <= 0 or noise_power <= 0:
        return waveform
    scale = np.sqrt(signal_power / noise_power / 10 ** (snr_db / 10))
    return (waveform + scale * stretch).astype(np.float32)


@functools.lru_cache(maxsize=8)
def noise_files(folder: str) -> list[str]:
    """Audio files below a folder, sorted.

    Raises:
        ConfigError: there are none.
    """
    root = Path(folder).expanduser()
    files = sorted(str(path) for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise ConfigError(f"noise_folder {folder!r} holds no audio ({', '.join(AUDIO_SUFFIXES)}).")
    return files


@functools.lru_cache(maxsize=256)
def _load_bed(path: str) -> np.ndarray:
    waveform = load_audio(path)
    if not np.any(waveform):
        raise AudioError(f"the noise file {path!r} is silent; remove it.")
    return waveform


def mask_features(
    features: Tensor, num_frames: Sequence[int], spec: SpecAugmentConfig, rng: np.random.Generator
) -> None:
    """SpecAugment in place: masked stretches and bands take the mean of their window's valid frames.

    Args:
        features: log-mel windows (W, M, T).
        num_frames: valid frames of each window.
        spec: what to mask.
        rng: the source of chance.
    """
    for window, length in zip(features, num_frames, strict=True):
        mean = window[:, :length].mean()
        for start, end in _time_spans(length, FRAMES_PER_S, spec, rng):
            window[:, start:end] = mean
        for _ in range(spec.mel_masks):
            width = int(rng.integers(spec.max_mels + 1))
            first = int(rng.integers(max(1, window.shape[0] - width + 1)))
            window[first : first + width, :length] = mean


def mask_rows(
    rows: np.ndarray, spec: SpecAugmentConfig, rng: np.random.Generator, rows_per_s: int = AUDIO_TOKENS_PER_S
) -> np.ndarray:
    """Masked stretches of encoder outputs (A, D), set to 0, which is their mean after the LayerNorm. A copy."""
    rows = rows.copy()
    for start, end in _time_spans(len(rows), rows_per_s, spec, rng):
        rows[start:end] = 0
    return rows


def _time_spans(
    length: int, rate: int, spec: SpecAugmentConfig, rng: np.random.Generator
) -> list[tuple[int, int]]:
    left = int(length * spec.max_time_share)
    spans = []
    for _ in range(spec.time_masks):
        width = min(left, int(rng.integers(int(spec.max_time_s * rate) + 1)))
        start = int(rng.integers(max(1, length - width + 1)))
        left -= width
        spans.append((start, start + width))
    return spans
