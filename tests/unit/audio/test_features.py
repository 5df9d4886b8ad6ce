"""Log-mel features, their mask, and the settings of the extractor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from audioflamingo.audio import features
from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor, log_mel_spectrogram, mel_filter_bank
from audioflamingo.errors import ArgumentError, AudioError, ConfigError
from tests.support.audio_files import tone

HF_SETTINGS = {
    "chunk_length": 30,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_filter_bank(num_mel_bins):
    filters = mel_filter_bank(num_mel_bins)
    assert filters.shape == (num_mel_bins, 201)
    assert filters.dtype == torch.float32
    assert (filters >= 0).all()
    assert (filters.sum(dim=1) > 0).all()  # no filter falls between two bins
    peaks = filters.argmax(dim=1)
    assert (peaks.diff() >= 0).all()
    assert filters.sum(dim=1)[-1] * 40 == pytest.approx(1, rel=0.05)  # unit area; a bin is 40 Hz wide


@pytest.mark.parametrize("num_samples", [1, 160, 161, 321, 8000, 479520, 479999, 480000])
def test_shapes_and_mask(num_samples):
    extractor = AudioFlamingo3FeatureExtractor()
    features, mask = extractor.extract([np.ones(num_samples, np.float32), np.zeros(5, np.float32)])
    assert features.shape == (2, 128, 3000)
    assert features.dtype == torch.float32
    assert mask.dtype == torch.int32
    num_valid = math.ceil(num_samples / 160)
    assert mask.tolist() == [[1] * num_valid + [0] * (3000 - num_valid), [1] + [0] * 2999]


@pytest.mark.parametrize("num_samples", [1, 399, 4001, 100000, 479400, 479600, 479999])
def test_frames_after_the_audio_need_no_spectrum(num_samples):
    """The shortcut for short windows must equal the features of the padded window."""
    waveform = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    padded = torch.zeros(1, 480000)
    padded[0, :num_samples] = torch.from_numpy(waveform)
    features, _ = AudioFlamingo3FeatureExtractor().extract([waveform])
    torch.testing.assert_close(features, log_mel_spectrogram(padded), rtol=0, atol=1e-6)


def test_silence_is_the_floor():
    features, _ = AudioFlamingo3FeatureExtractor().extract([np.zeros(16000, np.float32)])
    assert torch.equal(features, torch.full_like(features, -1.5))


def test_the_range_is_that_of_the_window_not_of_the_batch():
    quiet, loud = tone(1.0)[:, 0] * 0.1, tone(1.0)[:, 0]
    extractor = AudioFlamingo3FeatureExtractor(80)
    together, _ = extractor.extract([quiet, loud])
    assert torch.equal(together[0], extractor.extract([quiet])[0][0])
    assert torch.equal(together[1], extractor.extract([loud])[0][0])
    for row in together:
        assert row.max() - row.min() == pytest.approx(2.0, abs=1e-5)  # 8 in log10, divided by 4


def test_a_tone_peaks_in_its_filter():
    waveform = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    features, _ = AudioFlamingo3FeatureExtractor().extract([waveform])
    assert features[0, :, 50].argmax() == mel_filter_bank(128)[:, 25].argmax()  # bin 25 is 1000 Hz


@pytest.mark.parametrize("shape", [(0,), (480001,), (1, 16000)])
def test_windows_of_a_wrong_shape(shape):
    with pytest.raises(AudioError, match="window 1"):
        AudioFlamingo3FeatureExtractor().extract([np.zeros(10, np.float32), np.zeros(shape, np.float32)])


@pytest.mark.parametrize(
    "windows", [[], np.zeros(100, np.float32), torch.zeros(2, 100)], ids=["empty", "array", "tensor"]
)
def test_windows_must_be_a_list(windows):
    with pytest.raises(ArgumentError, match="list"):
        AudioFlamingo3FeatureExtractor().extract(windows)


def test_short_windows_for_small_models():
    features, mask = AudioFlamingo3FeatureExtractor(16, chunk_length=1).extract([np.ones(8000, np.float32)])
    assert features.shape == (1, 16, 100)
    assert mask.sum() == 50


def test_settings_come_back():
    extractor = AudioFlamingo3FeatureExtractor.from_dict(
        {**HF_SETTINGS, "processor_class": "X", "new_key": [1]}
    )
    assert (extractor.num_samples, extractor.num_frames) == (480000, 3000)
    assert extractor.to_dict() == {**HF_SETTINGS, "processor_class": "X", "new_key": [1]}
    assert AudioFlamingo3FeatureExtractor.from_dict({}).to_dict() == {
        **HF_SETTINGS,
        "return_attention_mask": True,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling_rate", 22050),
        ("hop_length", 80),
        ("n_fft", 512),
        ("dither", 0.1),
        ("padding_value", 1.0),
        ("padding_side", "left"),
        ("feature_size", 0),
        ("feature_size", 80.5),
        ("chunk_length", -1),
        ("n_samples", 240000),
        ("nb_max_frames", 1500),
        ("feature_extractor_type", "Wav2Vec2FeatureExtractor"),
    ],
)
def test_settings_that_are_not_supported(key, value):
    with pytest.raises(ConfigError, match=key):
        AudioFlamingo3FeatureExtractor.from_dict({**HF_SETTINGS, key: value})


def test_features_of_a_device_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows together and whole, as on a GPU, against one at a time as far as it has sound."""
    monkeypatch.setattr(features, "BATCH_WINDOWS", 3)
    generator = np.random.default_rng(3)
    lengths = [1, 399, 400, 16000, 16001, 479_999, 480_000]
    windows = [generator.standard_normal(n).astype(np.float32) for n in lengths]
    extractor = AudioFlamingo3FeatureExtractor()
    expected, expected_mask = extractor.extract(windows)
    extractor.device = torch.device("cpu")
    found, mask = extractor.extract(windows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(mask, expected_mask)
    assert mask.dtype == expected_mask.dtype
    assert "device" not in extractor.to_dict()
