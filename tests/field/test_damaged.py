"""A damaged file is an error; who asks for it gets what is left, and is told what is not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from audioflamingo.audio import load_audio
from audioflamingo.errors import AudioError, AudioFlamingoWarning
from audioflamingo.transcription import TranscriptionOptions
from tests.support.audio_files import KINDS, encode, tone
from tests.support.recordings import Track, heard, record

FILES = {kind: encode(tone(2.0, 48000, noise=0.02), 48000, kind) for kind in KINDS}
WITHOUT_INDEX = ("m4a", "mp4")  # which stands at the end


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("aac", *WITHOUT_INDEX)])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_what_is_left_of_a_cut_file(kind, part):
    if kind in ("ogg", "opus") and part < 0.5:
        pytest.skip("less than the first page of sound")
    whole = FILES[kind]
    cut = whole[: int(len(whole) * part)]
    with pytest.raises(AudioError, match=r"allow_damaged=True|--allow-damaged"):
        load_audio(cut)
    with pytest.warns(AudioFlamingoWarning, match=r"is cut short or damaged: .*\d"):
        rest = load_audio(cut, allow_damaged=True)
    assert len(rest) / 32000 == pytest.approx(part, abs=0.1 if kind not in ("ogg", "opus") else 0.5)
    size = min(len(rest), 32000) - 2500
    if size > 0:
        np.testing.assert_allclose(rest[:size], load_audio(whole)[:size], atol=0.02)


def test_the_warning_states_what_was_lost():
    wav = FILES["wav"]
    with pytest.warns(AudioFlamingoWarning, match=r"\(96000 bytes are missing\)\. 1\.000 s are heard"):
        load_audio(wav[:-96000], allow_damaged=True)
    with pytest.warns(AudioFlamingoWarning, match=r"1\.\d\d\d s are heard; 0\.\d\d\d of 2\.000 s are lost"):
        load_audio(FILES["flac"][: len(FILES["flac"]) // 2 + 9000], allow_damaged=True)
    damaged = bytearray(FILES["flac"])
    damaged[len(damaged) // 2] ^= 1
    with pytest.warns(AudioFlamingoWarning, match=r"1\.9\d\d s are heard; 0\.0\d\d of 2\.000 s are lost"):
        rest = load_audio(bytes(damaged), allow_damaged=True)
    assert len(rest) == 32000  # what is lost is silence, so that times stay right


@pytest.mark.parametrize("kind", ["mkv", "webm", "ts"])
def test_times_behind_a_hole_stay_right(kind):
    formats = {
        "mkv": ("matroska", "pcm_s16le", 48000),
        "webm": ("webm", "libopus", 48000),
        "ts": ("mpegts", "mp2", 48000),
    }
    options = {"cluster_time_limit": "500"} if kind == "webm" else {}
    data = bytearray(
        record(*formats[kind], Track(duration_s=4.0), has_picture=kind == "mkv", options=options)
    )
    at, size = len(data) // 2, max(1500, len(data) // 20)
    if kind == "ts":
        del data[at - at % 188 : at - at % 188 + size - size % 188]
    else:
        data[at : at + size] = bytes(size)
    with pytest.raises(AudioError):
        load_audio(bytes(data))
    with pytest.warns(AudioFlamingoWarning, match="cut short or damaged"):
        found = heard(load_audio(bytes(data), allow_damaged=True))
    assert found[-1][1] == pytest.approx(4.0, abs=0.1)


def test_nothing_left_is_an_error_all_the_same():
    for data in (b"", b"RIFF" + bytes(100), FILES["m4a"][:3000], FILES["flac"][:50]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(AudioError):
                load_audio(data, allow_damaged=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_the_same_with_and_without(kind):
    np.testing.assert_array_equal(load_audio(FILES[kind], allow_damaged=True), load_audio(FILES[kind]))


def test_lost_ogg_pages_are_missed():
    """Each page has its checksum, and all of them matched."""
    data = record("ogg", "libopus", 48000, Track(duration_s=6.0), options={"page_duration": "200000"})
    starts = [i for i in range(len(data)) if data[i : i + 4] == b"OggS"]
    assert len(starts) > 8
    without = data[: starts[4]] + data[starts[6] :]
    with pytest.raises(AudioError, match=r"2 Ogg pages are missing at byte"):
        load_audio(without)
    with pytest.warns(AudioFlamingoWarning, match="2 Ogg pages are missing"):
        assert heard(load_audio(without, allow_damaged=True))[-1][1] == pytest.approx(6.0, abs=0.05)


def test_options_have_the_same_fields():
    assert TranscriptionOptions(allow_damaged=True, track=2, channel="left").reading.track == 2
