"""Files of every kind decode; damaged ones are errors and never silence."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from audioflamingo.audio import load_audio
from audioflamingo.errors import AudioError
from tests.support.audio_files import KINDS, encode, encode_video, tone

DATA = Path(__file__).parents[2] / "data"
EXACT = {"wav": 2**-15, "wav24": 2**-23, "wav_u8": 2**-7, "wav_float": 1e-7, "wav_double": 1e-7}
EXACT |= {"rf64": 2**-15, "aiff": 2**-15, "flac": 2**-15, "flac24": 2**-23}
PRIMING = {"aac": 1024}  # samples before the audio, which this container has no place to announce
FILES = {kind: encode(tone(1.0, 48000, noise=0.02), 48000, kind) for kind in KINDS}


def riff(channels: int = 1, rate: int = 16000, riff_bytes: int = 0, data_bytes: int = 0, data: bytes = b""):
    """A 16-bit WAV file with the sizes that the caller states, true or not."""
    step = 2 * channels
    layout = (b"RIFF", riff_bytes, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * step % 2**32, step, 16)
    return struct.pack("<4sI4s4sIHHIIHH4sI", *layout, b"data", data_bytes) + data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 2)])
def test_every_kind_decodes_to_the_mean_of_its_channels(kind, rate, channels):
    original = tone(1.0, rate, channels)
    decoded = load_audio(encode(original, rate, kind), target_rate=rate if kind in EXACT else 16000)
    if kind in EXACT:
        assert len(decoded) == rate
        np.testing.assert_allclose(decoded, original.mean(axis=1), atol=EXACT[kind])
        return
    start = PRIMING.get(kind, 0) * 16000 // rate
    assert abs(len(decoded) - start - 16000) <= 1024  # the last frame of a codec
    expected = load_audio(original, sampling_rate=rate)[2000:12000]
    assert np.abs(decoded[start + 2000 : start + 12000] - expected).max() < 0.035  # one sample late: 0.05


@pytest.mark.parametrize("kind", ["ogg", "wav"])
@pytest.mark.parametrize("channels", [6, 8, 12])
def test_many_channels(kind, channels):
    """PyAV's own conversion reads beyond the last of 8 or more planes: wrong samples, or a crash."""
    original = np.repeat(tone(0.5), channels, axis=1) * np.linspace(0.1, 1, channels, dtype=np.float32)
    decoded = load_audio(encode(original, 16000, kind))
    np.testing.assert_allclose(decoded[:8000], original.mean(axis=1), atol=0.05)


def test_the_rate_is_that_of_the_file_not_of_the_codec():
    """Opus always decodes at 48 kHz: a 16 kHz recording must not come out three times as long."""
    assert len(load_audio(encode(tone(1.0, 16000), 16000, "opus"))) == 16000


@pytest.mark.parametrize(
    ("riff_bytes", "data_bytes"),
    [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0, 0xFFFFFFFF), (0x7FFFFFFF, 0x7FFFF000), (0xFFFFFFFF, 0xFFFFFFDB)],
)
def test_wav_of_a_live_recorder_has_no_sizes(riff_bytes, data_bytes):
    samples = (tone(0.5)[:, 0] * 32767).astype("<i2")
    decoded = load_audio(riff(riff_bytes=riff_bytes, data_bytes=data_bytes, data=samples.tobytes()))
    np.testing.assert_array_equal(decoded, samples / np.float32(32768))


def test_chunks_and_tags_around_the_audio_are_no_audio():
    wav, mp3 = FILES["wav"], FILES["mp3"]
    np.testing.assert_array_equal(load_audio(wav + b"LIST\x04\x00\x00\x00INFO"), load_audio(wav))
    for junk in (b"TAG" + bytes(125), b"APETAGEX" + bytes(24)):
        np.testing.assert_array_equal(load_audio(mp3 + junk), load_audio(mp3))
    assert len(load_audio(mp3 + bytes(5000))) >= 16000  # zeros to the end of a block: played, not refused


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "aac"])  # aac announces nothing
@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.8, 0.97])
def test_truncated_file(kind, part):
    whole = FILES[kind]
    with pytest.raises(AudioError, match=r"cut short|not audio|no audio that"):
        load_audio(whole[: int(len(whole) * part)])


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "opus", "webm"])
def test_truncated_by_one_byte(kind):
    with pytest.raises(AudioError, match="cut short"):
        load_audio(FILES[kind][:-1])


@pytest.mark.parametrize("is_counted", [True, False])
def test_the_end_of_a_flac_that_looks_like_a_header(is_counted):
    """FFmpeg takes its last four bytes, a checksum among them, for a further packet, which does not decode."""
    data = bytearray((DATA / "false_header.flac").read_bytes())
    if not is_counted:  # as a live stream writes it
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    assert len(load_audio(bytes(data))) == 15154
    for damaged in (
        data[:-1],
        data[:-5],
        data[:-1000],
        data[:9000] + bytes([data[9000] ^ 255]) + data[9001:],
    ):
        with pytest.raises(AudioError, match="cut short or damaged"):
            load_audio(bytes(damaged))


@pytest.mark.parametrize("kind", ["flac", "flac24", "ogg", "opus"])
def test_one_changed_byte_shows_where_there_are_checksums(kind):
    rng = np.random.default_rng(0)
    for _ in range(5):
        damaged = bytearray(FILES[kind])
        damaged[rng.integers(len(damaged) // 3, 2 * len(damaged) // 3)] ^= 1 << rng.integers(8)
        with pytest.raises(AudioError):
            load_audio(bytes(damaged))


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus", "webm", "mp3", "m4a", "mp4"])
def test_a_hole_in_the_middle(kind):
    damaged = bytearray(FILES[kind])
    middle, width = len(damaged) // 2, max(1500, len(damaged) // 10)
    damaged[middle : middle + width] = bytes(width)
    with pytest.raises(AudioError):
        load_audio(bytes(damaged))


def test_a_hole_at_the_end_of_an_mp3_is_not_junk_after_it():
    damaged = FILES["mp3"][:-2000] + bytes(2000)
    with pytest.raises(AudioError, match=r"announces at least 0\.900 s of audio, and 0\.\d"):
        load_audio(damaged)


@pytest.mark.filterwarnings("ignore::audioflamingo.errors.AudioFlamingoWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_an_error_or_sound(kind):
    """No other exception, no crash, no silence. The seed is fixed, so there are no false alarms."""
    whole, rng = FILES[kind], np.random.default_rng(1)
    for trial in range(12):
        damaged = bytearray(whole)
        reach = 200 if trial % 2 else len(whole)  # every other time in the headers
        for _ in range(rng.integers(1, 8)):
            damaged[rng.integers(min(reach, len(whole)))] = rng.integers(256)
        try:
            decoded = load_audio(bytes(damaged))
        except AudioError:
            continue
        assert np.abs(decoded).max() > 0.01


@pytest.mark.parametrize("num_bytes", [1, 11, 100, 5000])
@pytest.mark.parametrize(
    "start", [b"", b"RIFF", b"OggS", b"fLaC", b"ID3\x04", b"\xff\xfb\x90", b"\x1a\x45\xdf\xa3"]
)
def test_random_bytes(start, num_bytes):
    with pytest.raises(AudioError):
        load_audio(start + np.random.default_rng(num_bytes).bytes(num_bytes))


@pytest.mark.parametrize("kind", ["wav", "wav_float", "ogg"])
def test_a_file_without_samples(kind):
    with pytest.raises(AudioError, match="zero samples"):
        load_audio(encode(tone(0.0), 16000, kind))


def test_not_audio():
    with pytest.raises(AudioError, match="0 bytes"):
        load_audio(b"")
    with pytest.raises(AudioError, match="not audio"):
        load_audio(b"These are words, not sound.\n" * 50)
    with pytest.raises(AudioError, match=r"no audio that can be decoded \(it holds: video"):
        load_audio(encode_video())


def test_a_playlist_is_not_followed(tmp_path):
    """FFmpeg would open the files and addresses that a playlist names."""
    (tmp_path / "secret.wav").write_bytes(FILES["wav"])
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(AudioError, match="not audio"):
            load_audio(tmp_path / name)


def test_impossible_rates_and_channels():
    data = bytes(2000)
    for rate in (0, 1, 999, 0x7FFFFFFF):
        with pytest.raises(AudioError):
            load_audio(riff(rate=rate, data_bytes=2000, data=data))
    with pytest.raises(AudioError):
        load_audio(riff(channels=0, data_bytes=2000, data=data))


def test_nan_in_a_float_file():
    waveform = tone(1.0)
    waveform[[3000, 9000]] = np.nan
    with pytest.raises(AudioError, match=r"2 of 16000 samples are NaN.*sample 3000 at 0\.188 s"):
        load_audio(encode(waveform, 16000, "wav_float"))


def test_tags_in_another_encoding_do_not_stop_decoding():
    mp3 = (
        b"ID3\x03\x00\x00\x00\x00\x00\x11TIT2\x00\x00\x00\x07\x00\x00\x00\xe9\xff\xfe\xe8\xe0\xe7"
        + FILES["mp3"]
    )
    np.testing.assert_array_equal(load_audio(mp3), load_audio(FILES["mp3"]))
