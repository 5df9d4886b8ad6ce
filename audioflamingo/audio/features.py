"""Waveform -> log-mel features: the input of the audio tower.

Whisper's front end (large-v3: 128 mels), in torch and float32, equal to transformers'
`WhisperFeatureExtractor`. The numbers 400, 160 and 16000 are part of the trained model, so they are constants
here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from audioflamingo.audio.loading import HOP_LENGTH, N_FFT, SAMPLING_RATE
from audioflamingo.config import CHUNK_LENGTH_S
from audioflamingo.errors import ArgumentError, AudioError, ConfigError, refuse_further_keywords
from audioflamingo.kernels.host import to_device

# Of transformers' feature extractors, with values that ask for what is done anyway. Longer audio is an error here.
FURTHER_KEYWORDS: dict[str, tuple[Any, ...]] = {
    "padding": ("max_length",),
    "truncation": (True,),
    "return_attention_mask": (True,),
    "do_normalize": (False,),
    "return_token_timestamps": (False,),
    "device": ("cpu",),
    "max_length": (),
    "pad_to_multiple_of": (),
}
LOG_FLOOR = 1e-10  # mel power below it counts as this: log10 is -10
BATCH_WINDOWS = 16  # whose spectra are computed together on a device: 80 MB
DYNAMIC_RANGE = 8.0  # in log10: values more than 80 dB under the loudest of the window are raised to that


@functools.lru_cache(maxsize=8)
def mel_filter_bank(num_mel_bins: int) -> torch.Tensor:
    """Triangular filters of unit area from 0 to 8000 Hz on the mel scale of Slaney's Auditory Toolbox (1998).

    The scale is linear below 1000 Hz (200/3 Hz a mel) and logarithmic above (27 mels for a factor of 6.4).

    Returns:
        float32 (num_mel_bins, N_FFT // 2 + 1); computed in float64. Shared: do not write to it.
    """
    hz_per_mel, mels_per_log_hz = 200 / 3, 27 / math.log(6.4)
    break_mel = 1000 / hz_per_mel
    top_mel = break_mel + math.log(SAMPLING_RATE / 2 / 1000) * mels_per_log_hz
    mels = torch.linspace(0, top_mel, num_mel_bins + 2, dtype=torch.float64)
    log_hz = 1000 * torch.exp((mels - break_mel) / mels_per_log_hz)
    corners = torch.where(mels < break_mel, mels * hz_per_mel, log_hz)[:, None]  # (M + 2, 1)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    bins = torch.linspace(0, SAMPLING_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising, falling = (
        (bins - left) / (centre - left),
        (right - bins) / (right - centre),
    )  # (M, N_FFT // 2 + 1)
    filters = torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)
    return filters.float()


def log_mel_spectrogram(
    waveforms: torch.Tensor, num_mel_bins: int = 128, num_frames: int | None = None
) -> torch.Tensor:
    """Log-mel features of zero-padded windows.

    Args:
        waveforms: float32 (W, samples), 16 kHz, at least `N_FFT` samples.
        num_mel_bins: M.
        num_frames: T of the result (default: samples // HOP_LENGTH). Frames beyond the samples hold what
            silence gives.

    Returns:
        float32 (W, M, T): `(max(log10(power), max of the window - 8) + 4) / 4`, on the device of `waveforms`.
    """
    window = torch.hann_window(N_FFT, device=waveforms.device)
    stft = torch.stft(waveforms, N_FFT, HOP_LENGTH, window=window, return_complex=True)  # (W, 201, T + 1)
    power = (stft[..., :-1].abs() ** 2).contiguous()  # (W, 201, T)
    filters = to_device(mel_filter_bank(num_mel_bins), waveforms.device)
    log_mel = (filters @ power).clamp(min=LOG_FLOOR).log10()  # (W, M, T)
    if num_frames is not None:
        pad = num_frames - log_mel.shape[-1]
        log_mel = torch.nn.functional.pad(log_mel, (0, pad), value=math.log10(LOG_FLOOR))
    loudest = log_mel.amax(dim=(1, 2), keepdim=True)  # (W, 1, 1)
    return (torch.maximum(log_mel, loudest - DYNAMIC_RANGE) + 4) / 4


class AudioFlamingo3FeatureExtractor:
    """Turns 16 kHz windows into log-mel features and a mask of their valid frames.

    The arguments are the keys of the checkpoint's feature extractor settings (`WhisperFeatureExtractor`).

    Args:
        feature_size: M, mel bins: 128 (80 in older Whisper encoders).
        sampling_rate: 16000; others are refused.
        hop_length: 160; others are refused.
        n_fft: 400; others are refused.
        chunk_length: seconds in a window; the published encoder has positions for 30.
        padding_value: 0.0; others are refused.
        padding_side: "right"; others are refused.
        dither: 0.0; others are refused.
        return_attention_mask: kept for the settings file. The mask is always returned.
        extra: settings that this class does not know; `to_dict` writes them back.

    Attributes:
        device: where spectra are computed, several windows together, and where the features then are: the model's if
            that is a GPU. None for the CPU, one window at a time. It is no setting of a checkpoint.

    Raises:
        ConfigError: a value that this front end does not implement.
    """

    feature_extractor_type = "WhisperFeatureExtractor"

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = SAMPLING_RATE,
        hop_length: int = HOP_LENGTH,
        chunk_length: int = CHUNK_LENGTH_S,
        n_fft: int = N_FFT,
        padding_value: float = 0.0,
        padding_side: str = "right",
        dither: float = 0.0,
        return_attention_mask: bool = True,
        extra: dict[str, Any] | None = None,
    ) -> None:
        fixed = {
            "sampling_rate": (sampling_rate, SAMPLING_RATE),
            "hop_length": (hop_length, HOP_LENGTH),
            "n_fft": (n_fft, N_FFT),
            "padding_value": (padding_value, 0.0),
            "padding_side": (padding_side, "right"),
            "dither": (dither, 0.0),
        }
        for name, (value, allowed) in fixed.items():
            if value != allowed:
                raise ConfigError(
                    f"feature extractor: {name}={value!r} is not supported; it must be {allowed!r}."
                )
        for name, count in (("feature_size", feature_size), ("chunk_length", chunk_length)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(
                    f"feature extractor: {name}={count!r} must be a whole number of at least 1."
                )
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.chunk_length = chunk_length
        self.n_fft = n_fft
        self.padding_value = padding_value
        self.padding_side = padding_side
        self.dither = dither
        self.return_attention_mask = return_attention_mask
        self.extra = dict(extra or {})
        self.device: torch.device | None = None

    @property
    def num_samples(self) -> int:
        """Samples in a window."""
        return self.chunk_length * self.sampling_rate

    @property
    def num_frames(self) -> int:
        """Mel frames in a window."""
        return self.num_samples // self.hop_length

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> AudioFlamingo3FeatureExtractor:
        """Builds the extractor from the settings of a checkpoint; unknown keys are kept in `extra`.

        Raises:
            ConfigError: another feature extractor's settings, or values that contradict each other.
        """
        kind = settings.get("feature_extractor_type", cls.feature_extractor_type)
        if kind != cls.feature_extractor_type:
            raise ConfigError(
                f"feature_extractor_type {kind!r} is not supported; it must be 'WhisperFeatureExtractor'."
            )
        derived = ("feature_extractor_type", "n_samples", "nb_max_frames")
        names = cls.__init__.__annotations__.keys() - {"extra", "return"}
        known = {key: value for key, value in settings.items() if key in names}
        extra = {key: value for key, value in settings.items() if key not in names and key not in derived}
        extractor = cls(**known, extra=extra)
        for key, value in (("n_samples", extractor.num_samples), ("nb_max_frames", extractor.num_frames)):
            if settings.get(key, value) != value:
                raise ConfigError(
                    f"feature extractor: {key}={settings[key]!r} contradicts "
                    f"chunk_length={extractor.chunk_length}, which gives {value}. Correct one of them."
                )
        return extractor

    def to_dict(self) -> dict[str, Any]:
        """Settings under the names that `WhisperFeatureExtractor` reads and writes."""
        return {
            **self.extra,
            "feature_extractor_type": self.feature_extractor_type,
            "feature_size": self.feature_size,
            "sampling_rate": self.sampling_rate,
            "hop_length": self.hop_length,
            "chunk_length": self.chunk_length,
            "n_fft": self.n_fft,
            "n_samples": self.num_samples,
            "nb_max_frames": self.num_frames,
            "padding_side": self.padding_side,
            "padding_value": self.padding_value,
            "dither": self.dither,
            "return_attention_mask": self.return_attention_mask,
        }

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> dict[str, torch.Tensor]:
        """The features of clips of one window each, in the words of transformers' feature extractors.

        Args:
            raw_speech: a waveform (samples,) or a list of them, 16 kHz.
            sampling_rate: Hz of the waveforms, to be checked.
            return_tensors: only "pt", which None is, too.
            **others: transformers' further keywords, as far as they ask for what is done anyway: full windows, a mask.

        Returns:
            `input_features` float32 (W, M, num_frames) and `attention_mask` int32 (W, num_frames).

        Raises:
            AudioError: another rate, or waveforms that `extract` refuses.
            ArgumentError: another kind of tensors, or a keyword that is unknown or asks for something else.
        """
        refuse_further_keywords("feature_extractor", others, FURTHER_KEYWORDS)
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(
                f"sampling_rate={sampling_rate}: resample to {self.sampling_rate} Hz (load_audio does)."
            )
        if return_tensors not in ("pt", None):
            raise ArgumentError(f"return_tensors={return_tensors!r}: only 'pt' (torch tensors) is supported.")
        is_one = isinstance(raw_speech, np.ndarray | torch.Tensor) and raw_speech.ndim == 1
        clips = [raw_speech] if is_one else list(raw_speech)
        features, mask = self.extract([np.asarray(clip, dtype=np.float32) for clip in clips])
        return {"input_features": features, "attention_mask": mask}

    def extract(self, windows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the features of W windows, each padded with zeros to `num_samples`.

        Args:
            windows: 16 kHz waveforms (samples,), 1 to `num_samples` samples each.

        Returns:
            `input_features` float32 (W, M, num_frames), and `input_features_mask` int32 (W, num_frames): 1
            for the first `ceil(samples / 160)` frames.

        Raises:
            AudioError: a window that is empty, too long or not one-dimensional.
            ArgumentError: not a list of arrays.
        """
        if isinstance(windows, np.ndarray | torch.Tensor) or not len(windows):
            raise ArgumentError(
                "windows must be a list of at least one array; wrap a single waveform: [waveform]."
            )
        for row, waveform in enumerate(windows):
            if waveform.ndim != 1 or not 1 <= len(waveform) <= self.num_samples:
                raise AudioError(
                    f"window {row} has shape {tuple(waveform.shape)}; it must be (samples,) with 1 to "
                    f"{self.num_samples} samples. Cut longer audio with split_windows."
                )
        num_frames = torch.tensor([math.ceil(len(waveform) / self.hop_length) for waveform in windows])
        mask = (torch.arange(self.num_frames) < num_frames[:, None]).int()  # (W, T)
        if self.device is not None:
            starts = range(0, len(windows), BATCH_WINDOWS)
            parts = [self._together(windows[start : start + BATCH_WINDOWS], self.device) for start in starts]
            return torch.cat(parts), to_device(mask, self.device)
        features = torch.empty(len(windows), self.feature_size, self.num_frames)
        for row, waveform in enumerate(windows):  # one at a time: the spectra of a batch would take gigabytes
            # Frames that start after the last sample hold silence, so no spectrum is needed there. A frame
            # reaches N_FFT / 2 samples to each side of its centre; so does the reflection at the end, which
            # must see zeros.
            num_needed = math.ceil((len(waveform) + N_FFT) / HOP_LENGTH) * HOP_LENGTH
            padded = np.zeros((1, min(num_needed, self.num_samples)), np.float32)
            padded[0, : len(waveform)] = waveform
            (features[row],) = log_mel_spectrogram(
                torch.from_numpy(padded), self.feature_size, self.num_frames
            )
        return features, mask

    def _together(self, windows: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
        """Features of a few windows, whole and at once, `(n, M, T)`."""
        padded = np.zeros((len(windows), self.num_samples), np.float32)
        for row, waveform in zip(padded, windows, strict=True):
            row[: len(waveform)] = waveform
        waveforms = to_device(torch.from_numpy(padded), device)
        return log_mel_spectrogram(waveforms, self.feature_size, self.num_frames)
