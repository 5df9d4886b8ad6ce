"""Further files of the same kinds as people report them; the sources stand in README.md beside this."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from audioflamingo.audio import load_audio
from audioflamingo.audio.decoding import read_audio_info
from audioflamingo.audio.loading import stream_channels
from audioflamingo.audio.reading import Reading
from audioflamingo.audio.timeline import Frame, Timeline
from audioflamingo.errors import AudioError, AudioFlamingoWarning
from tests.support.audio_files import encode, tone
from tests.support.recordings import Track, heard, record


def test_a_stream_of_wav_files_in_one():
    """A speech server sends each chunk with a header of its own."""
    chunks = [encode(tone(0.3), 16000, "wav") for _ in range(7)]
    np.testing.assert_array_equal(load_audio(b"".join(chunks)), np.tile(load_audio(chunks[0]), 7))


def test_an_m4a_of_which_the_head_alone_was_sent():
    data = encode(tone(1.0), 16000, "m4a")
    with pytest.raises(
        AudioError, match=r"an MP4 without its index \(moov\): the recording was not brought to its end"
    ):
        load_audio(data[: struct.unpack(">I", data[:4])[0]])


def test_stamps_that_fall_back_for_a_while():
    """One five-second piece of an hour carried stamps 30 s too early; the next was right again."""
    times = [i * 0.02 - (30 if 2000 <= i < 2250 else 0) for i in range(4000)]
    frames = [Frame(t, 1000, np.full((1, 20), i, np.float32)) for i, t in enumerate(times)]
    result = list(Timeline(0.0, "clip").place(frames))
    assert [frame.samples[0, 0] for frame in result] == list(range(4000))


def test_a_live_webm_without_duration():
    data = record("webm", "libopus", 48000, Track(duration_s=3.0), options={"live": "1"})
    info = read_audio_info(data)
    assert info is not None
    assert info.duration_s is None
    ((_, end),) = heard(load_audio(data))
    assert end == pytest.approx(3.0, abs=0.02)


def test_a_wav_whose_size_wrapped_around():
    """More than 4 GiB: the header counts modulo 2^32. Here the count is simply too small."""
    data = bytearray(encode(tone(2.0), 16000, "wav"))
    data[40:44] = struct.pack("<I", 20000)
    noise = np.random.default_rng(0).integers(1, 2**15, 22000, dtype=np.int16).tobytes()
    data[44 + 20000 :] = noise
    with pytest.warns(AudioFlamingoWarning, match=r"44000 bytes behind its sample data are not heard"):
        assert len(load_audio(bytes(data))) == 10000


@pytest.mark.filterwarnings("error")
def test_a_few_bytes_too_many_behind_the_samples():
    """A converter that writes to a pipe appends the size that it cannot write into the header."""
    data = encode(tone(0.5), 16000, "wav")
    np.testing.assert_array_equal(load_audio(data + b"\x80\x3e\0\0"), load_audio(data))


def test_a_wav_of_the_other_byte_order():
    samples = np.round(tone(0.5)[:, 0] * 32767).astype(">i2").tobytes()
    head = struct.pack(
        ">4sI4s4sIHHIIHH", b"RIFX", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16
    )
    data = head + b"data" + struct.pack(">I", len(samples)) + samples
    expected = np.frombuffer(samples, ">i2").astype(np.float32) / 32768
    np.testing.assert_array_equal(load_audio(data), expected)
    np.testing.assert_array_equal(load_audio(data + data), np.tile(expected, 2))
    with pytest.raises(AudioError, match="its sample data ends at byte"):
        load_audio(data[:-100])


def test_a_telephone_call_with_one_side_a_channel():
    """8 kHz, mu-law, agent left and customer right."""
    sides = np.stack([tone(1.0, 8000)[:, 0], 0.5 * np.flip(tone(1.0, 8000)[:, 0])])
    buffer = io.BytesIO()
    soundfile.write(buffer, sides.T, 8000, format="WAV", subtype="ULAW")
    both = np.concatenate(list(stream_channels(buffer, reading=Reading(channel="each"))), axis=1)
    for channel, side in zip(both, sides, strict=True):
        np.testing.assert_allclose(channel, load_audio(side, sampling_rate=8000), atol=0.03)


@pytest.mark.filterwarnings("error")
def test_a_call_of_which_one_side_is_silent():
    """Silence beside speech is neither cancelled nor worth a warning."""
    side = tone(1.0)[:, 0]
    np.testing.assert_array_equal(load_audio(np.stack([side, 0 * side])), side / 2)


def test_a_descriptive_track_is_not_the_first_choice():
    """No default flag: a track for the visually impaired comes first in the file."""
    import av

    buffer = io.BytesIO()
    data = record("matroska", "flac", 48000, Track(level=0, is_default=False), Track(is_default=False))
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as target:
        streams = [target.add_stream_from_template(stream) for stream in source.streams.audio]
        streams[0].disposition = av.stream.Disposition.visual_impaired
        streams[1].disposition = av.stream.Disposition(0)
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    with pytest.warns(AudioFlamingoWarning, match=r"Track 2 is heard"):
        assert heard(load_audio(buffer.getvalue()))
