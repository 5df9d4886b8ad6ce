"""Our front end beside the reference: librosa's loading and transformers' `WhisperFeatureExtractor`."""

from __future__ import annotations

import io

import librosa
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from audioflamingo.audio import load_audio
from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor, mel_filter_bank
from tests.support.audio_files import encode, tone


@pytest.fixture(scope="module", params=[80, 128])
def extractors(request):
    return AudioFlamingo3FeatureExtractor(request.param), WhisperFeatureExtractor(feature_size=request.param)


def make_waveform(sound: str, num_samples: int) -> np.ndarray:
    time = np.arange(num_samples) / 16000
    sounds = {
        "noise": 0.1 * np.random.default_rng(0).standard_normal(num_samples),
        "silence": np.zeros(num_samples),
        "tone": 0.5 * np.sin(2 * np.pi * 440 * time),
        "click at the end": np.where(np.arange(num_samples) == num_samples - 1, 1.0, 0.0),
    }
    return sounds[sound].astype(np.float32)


def test_filters_are_equal(extractors):
    ours, reference = extractors
    filters = torch.from_numpy(reference.mel_filters.T).float()
    assert torch.equal(mel_filter_bank(ours.feature_size), filters)


@pytest.mark.parametrize("sound", ["noise", "silence", "tone", "click at the end"])
@pytest.mark.parametrize("duration_s", [0.03, 0.05, 0.5, 7.3, 29.975, 29.99, 30.0])
def test_features_and_mask(extractors, sound, duration_s):
    ours, reference = extractors
    waveform = make_waveform(sound, round(duration_s * 16000))
    expected = reference(waveform, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    features, mask = ours.extract([waveform])
    torch.testing.assert_close(features, expected["input_features"], rtol=0, atol=1e-6)
    assert torch.equal(mask, expected["attention_mask"])
    assert mask.dtype == expected["attention_mask"].dtype


def test_a_batch_of_windows(extractors):
    ours, reference = extractors
    windows = [make_waveform("noise", n) for n in (480000, 480, 117000)]
    expected = reference(windows, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    features, mask = ours.extract(windows)
    torch.testing.assert_close(features, expected["input_features"], rtol=0, atol=1e-6)
    assert torch.equal(mask, expected["attention_mask"])


def test_settings_are_those_of_the_reference(extractors):
    ours, reference = extractors
    expected = {key: value for key, value in reference.to_dict().items() if key != "mel_filters"}
    assert AudioFlamingo3FeatureExtractor.from_dict(expected).to_dict() == expected
    rebuilt = WhisperFeatureExtractor(**ours.to_dict())
    assert rebuilt.nb_max_frames == ours.num_frames


@pytest.mark.parametrize("kind", ["wav", "wav24", "wav_u8", "wav_float", "flac"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_lossless_files_load_as_with_librosa(kind, rate):
    data = encode(tone(1.2345, rate, channels=2, noise=0.05), rate, kind)
    expected, _ = librosa.load(io.BytesIO(data), sr=16000)
    loaded = load_audio(data)
    assert len(loaded) == len(expected)
    np.testing.assert_allclose(loaded, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mp3", "mp3_lavf", "ogg"])
@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_lossy_files_load_as_with_librosa(kind, rate):
    """Two decoders: they agree on where the sound starts and ends (gapless) and nearly on its samples."""
    data = encode(tone(3.2, rate, channels=2, noise=0.05), rate, kind)
    expected, _ = librosa.load(io.BytesIO(data), sr=16000)
    loaded = load_audio(data)
    assert len(loaded) == len(expected)
    np.testing.assert_allclose(loaded, expected, rtol=0, atol=5e-6)


def test_opus_loads_as_with_librosa():
    data = encode(tone(1.2, 48000, channels=2, noise=0.05), 48000, "opus")
    expected, _ = librosa.load(io.BytesIO(data), sr=16000)
    np.testing.assert_allclose(load_audio(data), expected, rtol=0, atol=1e-4)
