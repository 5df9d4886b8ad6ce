"""Arrays, sampling rates, streaming, windows and token counts."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import soxr
import torch

from audioflamingo.audio.loading import (
    MAX_AUDIO_S,
    MAX_WINDOWS,
    MIN_SAMPLES,
    N_FRAMES,
    N_SAMPLES,
    check_waveform,
    conv_length,
    load_audio,
    num_audio_tokens,
    split_windows,
    stream_audio,
)
from audioflamingo.config import AUDIO_TOKENS_PER_S, CHUNK_LENGTH_S
from audioflamingo.errors import ArgumentError, AudioError, AudioFlamingoWarning, AudioTooLongError
from tests.support.audio_files import encode, tone

WAVEFORM = tone(0.25)[:, 0]


def test_constants():
    assert (N_SAMPLES, N_FRAMES, MAX_AUDIO_S, MAX_WINDOWS, MIN_SAMPLES) == (480000, 3000, 600, 20, 321)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ">f4"])
def test_floats_keep_their_values(dtype):
    loaded = load_audio(WAVEFORM.astype(dtype))
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, WAVEFORM.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "low", "middle", "high"),
    [
        ("int8", -128, 0, 64),
        ("int16", -(2**15), 0, 2**14),
        (">i2", -(2**15), 0, 2**14),
        ("int32", -(2**31), 0, 2**30),
        ("uint8", 0, 128, 192),
        ("uint16", 0, 2**15, 3 * 2**14),
        ("uint32", 0, 2**31, 3 * 2**30),
    ],
)
def test_integers_are_scaled_by_their_full_range(dtype, low, middle, high):
    np.testing.assert_array_equal(load_audio(np.array([low, middle, high], dtype)), np.float32([-1, 0, 0.5]))


@pytest.mark.parametrize("dtype", ["int64", "uint64", "bool", "complex64", "object", "U3"])
def test_arrays_that_are_no_samples(dtype):
    """64-bit integers scaled by their full range would be silence: they nearly always hold 16-bit samples."""
    with pytest.raises(AudioError, match=r"dtype.*[Cc]onvert"):
        load_audio(np.ones(1000).astype(dtype))


def test_the_shorter_axis_holds_the_channels():
    stereo = np.stack([WAVEFORM, WAVEFORM * 0.5])
    for array in (stereo, stereo.T, torch.from_numpy(stereo), np.asfortranarray(stereo)):
        np.testing.assert_allclose(load_audio(array), WAVEFORM * 0.75, rtol=1e-6)
    np.testing.assert_array_equal(load_audio(WAVEFORM[None]), WAVEFORM)


@pytest.mark.parametrize("shape", [(), (4, 4), (1, 2, 1000), (2, 1, 1000)])
def test_shapes_that_are_unclear(shape):
    with pytest.raises(AudioError, match="shape"):
        load_audio(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 0)])
def test_no_samples(shape):
    with pytest.raises(AudioError, match="zero samples"):
        load_audio(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors(dtype):
    tensor = torch.from_numpy(WAVEFORM).to(dtype).requires_grad_()
    np.testing.assert_array_equal(load_audio(tensor), tensor.detach().float().numpy())


def test_integer_tensor():
    np.testing.assert_array_equal(load_audio(torch.tensor([-(2**15), 2**14], dtype=torch.int16)), [-1, 0.5])


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(9, device="meta"), torch.zeros(9).to_sparse(), torch.zeros(9, dtype=torch.cfloat)],
    ids=["meta", "sparse", "complex"],
)
def test_tensors_without_real_samples(tensor):
    with pytest.raises(AudioError, match=r"tensor|array"):
        load_audio(tensor)


def test_the_callers_array_is_neither_changed_nor_shared():
    source = WAVEFORM.copy()
    source.flags.writeable = False
    loaded = load_audio(source)
    assert loaded.flags.writeable
    assert not np.shares_memory(loaded, source)


def test_nan_and_infinity_are_counted():
    waveform = np.tile(WAVEFORM, 100)  # longer than a block
    waveform[[1000, 300000, 390000]] = [np.nan, np.inf, -np.inf]
    with pytest.raises(AudioError, match=r"3 of 400000 samples are NaN.*sample 1000 at 0\.125 s"):
        load_audio(waveform, sampling_rate=8000)
    with pytest.raises(AudioError, match="1000 of 1000 samples"):
        load_audio(np.full(1000, 1e300))


def test_loud_floats_are_used_with_one_warning():
    with pytest.warns(AudioFlamingoWarning, match="reach 13107") as caught:
        loaded = load_audio(WAVEFORM / np.abs(WAVEFORM).max() * 13107)
    assert len(caught) == 1
    assert np.abs(loaded).max() == pytest.approx(13107)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(WAVEFORM * 9)  # overdriven, but audio


@pytest.mark.parametrize("peak", [1e13, 7e31])
def test_numbers_that_are_no_audio_are_refused(peak):
    """A damaged float WAV with finite samples of 7e31 once gave features, and logits, of NaN."""
    with pytest.raises(AudioError, match="no audio"):
        load_audio((WAVEFORM * (peak / np.abs(WAVEFORM).max())).astype(np.float32))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, np.int32(8000), 22050.5])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 100, 12345])
def test_resampling_is_that_of_soxr_padded_to_the_rounded_up_length(rate, num_samples):
    """librosa's rule: ceil(n * ratio) samples, of which soxr may leave the last one out."""
    waveform = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    expected = soxr.resample(waveform, float(rate), 16000, quality="HQ")
    length = int(np.ceil(num_samples * (16000 / float(rate))))
    loaded = load_audio(waveform, sampling_rate=rate)
    assert len(loaded) == length
    np.testing.assert_array_equal(loaded, np.pad(expected, (0, max(0, length - len(expected))))[:length])


def test_target_rate():
    assert len(load_audio(WAVEFORM, sampling_rate=16000, target_rate=8000)) == 2000
    assert len(load_audio(WAVEFORM, target_rate=8000)) == 4000  # the array is taken to be at the target rate


@pytest.mark.parametrize("rate", [0, -16000, 0.5, float("nan"), float("inf")])
def test_impossible_rates(rate):
    for name in ("sampling_rate", "target_rate"):
        with pytest.raises(AudioError, match=name):
            load_audio(WAVEFORM, **{name: rate})


@pytest.mark.parametrize("rate", ["16000", True, [16000]])
def test_rates_of_another_type(rate):
    with pytest.raises(ArgumentError, match="sampling_rate"):
        load_audio(WAVEFORM, sampling_rate=rate)


def test_a_file_states_its_own_rate():
    wav = encode(tone(0.1), 16000, "wav")
    with pytest.raises(ArgumentError, match="sampling_rate=16000"):
        load_audio(wav, sampling_rate=16000)


@pytest.mark.parametrize("kind", ["wav", "mp3", "array"])
def test_streaming_gives_the_same_samples_in_small_blocks(kind):
    waveform = tone(20.0, 44100, 2)
    source = waveform if kind == "array" else encode(waveform, 44100, kind)
    rate = 44100 if kind == "array" else None
    blocks = list(stream_audio(source, sampling_rate=rate))
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(source, sampling_rate=rate))
    assert all(0 < len(block) <= 100_000 for block in blocks)
    assert sum(len(block) for block in blocks) == 320000


def test_a_stream_may_be_left_early(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(encode(tone(5.0), 16000, "wav"))
    stream = stream_audio(path)
    next(stream)
    stream.close()
    path.unlink()


@pytest.mark.parametrize(
    ("num_frames", "conv", "tokens"),
    [
        (0, 0, 0),
        (1, 1, 0),
        (2, 1, 0),
        (3, 2, 1),
        (4, 2, 1),
        (5, 3, 1),
        (6, 3, 1),
        (7, 4, 2),
        (3000, 1500, 750),
    ],
)
def test_token_counts(num_frames, conv, tokens):
    """C-like truncation of -1 // 2 would give one token too many for 1 and 2 frames."""
    assert conv_length(num_frames) == conv
    assert num_audio_tokens(num_frames) == tokens
    assert num_audio_tokens(torch.tensor([num_frames], dtype=torch.int32)).tolist() == [tokens]


def test_tokens_a_second() -> None:
    assert num_audio_tokens(N_FRAMES) == CHUNK_LENGTH_S * AUDIO_TOKENS_PER_S


@pytest.mark.parametrize("num_frames", [2, 3, 6, 7, 99, 3000])
def test_token_counts_are_those_of_the_layers(num_frames):
    frames = torch.zeros(1, 1, num_frames)
    conv = torch.nn.functional.conv1d(frames, torch.zeros(1, 1, 3), stride=2, padding=1)
    assert conv.shape[-1] == conv_length(num_frames)
    if conv.shape[-1] > 1:
        assert torch.nn.functional.avg_pool1d(conv, 2, 2).shape[-1] == num_audio_tokens(num_frames)


def test_check_waveform():
    check_waveform(np.zeros(321, np.float32))
    with pytest.raises(AudioError, match=r"clip\.wav lasts 0\.0200 s \(320 samples.*321 samples"):
        check_waveform(np.zeros(320, np.float32), "clip.wav")
    with pytest.raises(AudioError, match="shape"):
        check_waveform(np.zeros((2, 1000), np.float32))


@pytest.mark.parametrize(
    ("num_samples", "lengths"),
    [(1, [1]), (480000, [480000]), (480001, [480000, 1]), (959999, [480000, 479999])],
)
def test_split_windows(num_samples, lengths):
    waveform = np.arange(num_samples, dtype=np.float32)
    for on_long in ("truncate", "error"):
        windows = split_windows(waveform, on_long=on_long)
        assert [len(window) for window in windows] == lengths
        np.testing.assert_array_equal(np.concatenate(windows), waveform)


def test_a_long_clip_is_cut_with_one_warning_or_refused():
    waveform = np.zeros(20 * 480000 + 8000, np.float32)
    message = r"a\.wav lasts 600\.50 s.*600\.00 s are kept.*0\.50 s are lost"
    with pytest.warns(AudioFlamingoWarning, match=message) as caught:
        windows = split_windows(waveform, name="a.wav")
    assert [len(window) for window in windows] == [480000] * 20
    assert len(caught) == 1
    with pytest.raises(AudioTooLongError, match=r"600\.50 s.*at most 600\.00 s"):
        split_windows(waveform, on_long="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(split_windows(waveform, max_windows=21)) == 21
        assert len(split_windows(waveform[: 20 * 480000])) == 20


def test_split_windows_refuses_other_choices():
    with pytest.raises(ArgumentError, match=r"'cut'.*'truncate' or 'error'"):
        split_windows(WAVEFORM, on_long="cut")
    with pytest.raises(ArgumentError, match="max_windows"):
        split_windows(WAVEFORM, max_windows=0)


def test_libraries_are_imported_where_they_are_used():
    code = "import sys, torch; before = set(sys.modules); import audioflamingo.audio.features; "
    code += "print({'av', 'soxr', 'urllib.request'} & (set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_16_bit_samples_in_a_32_bit_array_are_noticed(dtype: type) -> None:
    """They load 90 dB too quiet, and the model then hears silence."""
    samples = (np.sin(np.arange(4000)) * 30000).astype(np.int64)
    samples = samples + (2**31 if dtype is np.uint32 else 0)
    with pytest.warns(AudioFlamingoWarning, match=r"largest sample is 29999 of 2147483648"):
        load_audio(samples.astype(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio((np.sin(np.arange(4000)) * 2e9).astype(np.int32))
