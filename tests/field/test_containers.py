"""Files that a common program writes and another reads: each is heard whole, or refused with the reason."""

from __future__ import annotations

import io
import os
import struct
import threading

import numpy as np
import pytest
import soundfile

from audioflamingo.audio import load_audio
from audioflamingo.audio.decoding import read_audio_info
from audioflamingo.audio.joined_recordings import FilePart
from audioflamingo.errors import AudioError, AudioFlamingoWarning
from tests.support.audio_files import encode, tone
from tests.support.recordings import Track, heard, record

FURTHER = [  # container, codec, rate
    ("mpegts", "aac", 44100),
    ("mpegts", "mp2", 48000),
    ("mpeg", "mp2", 48000),
    ("avi", "libmp3lame", 44100),
    ("avi", "pcm_s16le", 44100),
    ("flv", "aac", 44100),
    ("asf", "wmav2", 44100),
    ("au", "pcm_mulaw", 8000),
    ("voc", "pcm_u8", 20000),
    ("wv", "wavpack", 16000),
    ("tta", "tta", 16000),
    ("ac3", "ac3", 48000),
    ("ac3", "ac3", 44100),
    ("eac3", "eac3", 48000),
    ("w64", "pcm_s16le", 16000),
    ("caf", "pcm_s16le", 16000),
]
ID3 = b"ID3\3\0\0\0\0\0\x0a" + bytes(10)


@pytest.mark.parametrize("kind", FURTHER, ids=str)
def test_containers_that_name_no_other_files(kind):
    data = record(*kind)
    ((start, end),) = heard(load_audio(data))
    assert start < 0.1  # what a codec puts ahead
    assert end - start == pytest.approx(2.0, abs=0.02)
    info = read_audio_info(data)
    assert info is not None
    assert info.codec.startswith(kind[1].removeprefix("lib")[:2])
    assert info.sampling_rate == kind[2]


@pytest.mark.parametrize("kind", FURTHER, ids=str)
@pytest.mark.parametrize("part", [0.21, 0.53, 0.81, 0.97])
def test_a_part_of_one_is_an_error(kind, part):
    data = record(*kind, Track(duration_s=1.9))
    cut = int(len(data) * part) | 1  # no whole number of packets
    with pytest.raises(AudioError, match=r"cut short|not audio|no audio that"):
        load_audio(data[:cut])


def test_sphere():
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(1.0), 16000, format="NIST")
    np.testing.assert_allclose(load_audio(buffer.getvalue()), tone(1.0)[:, 0], atol=2**-14)
    with pytest.raises(AudioError, match=r"its sample data ends at byte 33024 .* \(1024 bytes are missing\)"):
        load_audio(buffer.getvalue()[:-1024])


def test_the_refusal_lists_what_is_taken():
    with pytest.raises(AudioError, match=r"not audio of a kind that can be read \(wav, aiff, au, sph, caf"):
        load_audio(b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk" + bytes(500))


def wav(samples: np.ndarray, bits: int, valid_bits: int, kind: int = 1, rate: int = 16000) -> bytes:
    """A WAV file with an extensible header, its samples in the high bits."""
    size = bits // 8
    raw = np.round(samples * 2 ** (bits - 1)).astype("<i4").tobytes()
    data = b"".join(raw[i : i + size] for i in range(0, len(raw), 4))
    guid = bytes([kind]) + b"\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    fmt = struct.pack("<HHIIHHHHI", 0xFFFE, 1, rate, rate * size, size, bits, 22, valid_bits, 4) + guid
    head = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


@pytest.mark.parametrize(
    ("bits", "valid_bits"), [(32, 24), (32, 20), (32, 16), (24, 20), (16, 12), (32, 32), (24, 24)]
)
def test_samples_that_do_not_fill_their_bits(bits, valid_bits):
    """FFmpeg takes 24 bits in 32 for floating point, and makes NaN of them."""
    steps = 2 ** (valid_bits - 1)
    samples = np.round(tone(0.5)[:, 0].astype(np.float64) * steps) / steps
    np.testing.assert_array_equal(load_audio(wav(samples, bits, valid_bits)), samples.astype(np.float32))


@pytest.mark.parametrize("kind", ["wav", "rf64", "aiff", "ogg", "wav24"])
@pytest.mark.parametrize("tags", [ID3, ID3 + ID3, b"ID3\4\0\x10\0\0\0\x0a" + bytes(20)])
def test_a_tag_ahead_of_the_file_is_passed_over(kind, tags):
    data = encode(tone(0.5), 16000, kind)
    np.testing.assert_array_equal(load_audio(tags + data), load_audio(data))


@pytest.mark.parametrize("kind", ["wav", "rf64", "aiff", "m4a", "mp4"])
@pytest.mark.parametrize("num_parts", [2, 3])
def test_recordings_that_were_joined_are_all_heard(kind, num_parts):
    parts = [encode(tone(0.5 + 0.25 * i, 16000), 16000, kind) for i in range(num_parts)]
    joined = load_audio(b"".join(parts))
    np.testing.assert_array_equal(joined, np.concatenate([load_audio(part) for part in parts]))
    with pytest.raises(AudioError, match=r"cut short|not audio"):
        load_audio(b"".join(parts)[:-5000])


def test_joined_au_fragmented_mp4_and_wav_of_odd_length():
    au = record("au", "pcm_mulaw", 8000, Track(duration_s=1.0))
    assert len(load_audio(au + au)) == 32000
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"}
    mp4 = record("mp4", "aac", 44100, Track(duration_s=1.0), options=options)
    assert len(load_audio(mp4 + mp4)) == pytest.approx(2 * len(load_audio(mp4)), abs=2)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5)[:7999], 16000, format="WAV", subtype="PCM_U8")
    assert len(load_audio(buffer.getvalue() * 2)) == 2 * 7999
    without_filling = buffer.getvalue()[: 44 + 7999]
    assert len(load_audio(without_filling * 2)) == 2 * 7999


def test_joined_recordings_of_different_rates_and_channels():
    first, second = encode(tone(1.0, 44100, 2), 44100, "wav"), encode(tone(1.0, 8000), 8000, "wav")
    with pytest.warns(AudioFlamingoWarning, match=r"changes from 44100 to 8000 Hz at 1\.0 s"):
        joined = load_audio(first + second)
    np.testing.assert_array_equal(joined, np.concatenate([load_audio(first), load_audio(second)]))


@pytest.mark.parametrize("rates", [(44100, 22050), (22050, 44100), (48000, 16000)])
def test_a_rate_that_changes_in_mid_stream(rates):
    options = {"write_xing": "0", "id3v2_version": "0"}
    parts = [record("mp3", "libmp3lame", rate, Track(duration_s=1.0), options=options) for rate in rates]
    with pytest.warns(AudioFlamingoWarning, match=f"changes from {rates[0]} to {rates[1]} Hz"):
        joined = load_audio(parts[0] + parts[1])
    assert len(joined) / 16000 == pytest.approx(2.0, abs=0.15)
    spectrum = np.abs(np.fft.rfft(joined[-12000:-4000]))
    assert np.argmax(spectrum) * 2 == pytest.approx(440, abs=4)  # the second part at its true pitch


def test_samples_behind_a_header_that_does_not_count_them_in():
    data = encode(tone(1.0), 16000, "wav")
    with pytest.warns(AudioFlamingoWarning, match=r"8000 bytes behind its sample data are not heard"):
        assert len(load_audio(data + encode(tone(1.0), 16000, "wav")[1001:9001])) == 16000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rest", [b"\0" * 5000, b"ID3\3" + b"x" * 3000, b"LIST\4\0\0\0INFO", b"TAG" + bytes(125), b"\n"]
)
def test_what_is_no_sound_is_not_worth_a_word(rest):
    data = encode(tone(1.0), 16000, "wav")
    np.testing.assert_array_equal(load_audio(data + rest), load_audio(data))


def test_a_pipe_is_read_as_a_file(tmp_path):
    pipe, data = tmp_path / "pipe", encode(tone(0.5), 16000, "m4a")
    os.mkfifo(pipe)
    assert read_audio_info(pipe) is None  # or there would be nothing left of it
    writer = threading.Thread(target=lambda: pipe.write_bytes(data))
    writer.start()
    np.testing.assert_array_equal(load_audio(pipe), load_audio(data))
    writer.join()
    read, write = os.pipe()
    with os.fdopen(write, "wb") as file:
        file.write(data)
    np.testing.assert_array_equal(load_audio(f"/dev/fd/{read}"), load_audio(data))
    os.close(read)


def test_pieces_without_their_header():
    webm = record("webm", "libopus", 48000, options={"live": "1"})
    cluster = webm.index(b"\x1f\x43\xb6\x75")
    block = webm.index(b"\xa3", cluster)
    for at in (cluster, block):
        with pytest.raises(AudioError, match="a piece of WebM without its header"):
            load_audio(webm[at:])
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"}
    mp4 = record("mp4", "aac", 44100, options=options)
    with pytest.raises(AudioError, match=r"a piece of MP4 without its header \(moov\)"):
        load_audio(mp4[mp4.index(b"moof") - 4 :])
    whole = record("mp4", "aac", 44100)
    with pytest.raises(AudioError, match="an MP4 without its index"):
        load_audio(whole[: whole.index(b"moov") - 4])
    ogg = record("ogg", "libopus", 48000, Track(duration_s=5.0))
    with pytest.raises(AudioError, match="a piece of Ogg without its header"):
        load_audio(ogg[ogg.index(b"OggS", len(ogg) // 2) :])


def test_a_stretch_of_a_file_reads_as_a_file():
    data = bytes(range(200))
    part = FilePart(io.BytesIO(data), 10, 150, {5: b"ab", 139: b"z"})
    expected = bytearray(data[10:150])
    expected[5:7], expected[139:] = b"ab", b"z"
    assert part.read() == expected
    for at in range(140):
        for size in (1, 2, 7, 300):
            assert part.seek(at) == at
            assert part.read(size) == expected[at : at + size]
            assert part.tell() == min(140, at + size)
    assert part.seek(-3, os.SEEK_END) == 137
    assert part.read(10) == expected[137:]
    assert part.read(1) == b""
