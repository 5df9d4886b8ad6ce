"""Where sound is heard is where its container says, whatever the container."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from audioflamingo.audio import load_audio
from audioflamingo.audio.timeline import Frame, Timeline
from audioflamingo.errors import AudioError, AudioFlamingoWarning
from tests.support.audio_files import encode, tone
from tests.support.recordings import Track, heard, record

CLOSE_S = 0.05
TIMED = [
    ("matroska", "aac", 48000),
    ("matroska", "flac", 48000),
    ("matroska", "pcm_s16le", 48000),
    ("matroska", "pcm_u8", 16000),
    ("webm", "libopus", 48000),
    ("mp4", "aac", 44100),
    ("mpegts", "aac", 44100),
    ("mpegts", "mp2", 48000),
    ("mpeg", "mp2", 48000),
    ("flv", "aac", 44100),
    ("asf", "wmav2", 44100),
]
WITH_PICTURE = [kind for kind in TIMED if kind[0] not in ("webm", "asf")]


@pytest.mark.parametrize("kind", TIMED, ids=str)
def test_a_gap_in_the_time_stamps_is_silence(kind):
    (first, second) = heard(load_audio(record(*kind, Track(gap=(0.8, 3.0)))))
    assert first == pytest.approx((0, 0.85), abs=0.1)  # asf sounds a tenth of a second late
    assert second[0] - first[1] == pytest.approx(3.0, abs=CLOSE_S)
    assert second[1] - first[0] == pytest.approx(5.0, abs=CLOSE_S)


@pytest.mark.parametrize("kind", WITH_PICTURE, ids=str)
@pytest.mark.parametrize("start_s", [0.2, 5.0])
def test_sound_that_starts_later_than_its_picture(kind, start_s):
    """Refused as cut short in Matroska, whose DURATION is an end and no length; early by the delay elsewhere."""
    ((start, end),) = heard(load_audio(record(*kind, Track(start_s=start_s), has_picture=True)))
    assert start == pytest.approx(start_s, abs=CLOSE_S)
    assert end == pytest.approx(start_s + 2, abs=CLOSE_S)


@pytest.mark.parametrize(
    "kind", [("matroska", "flac", 48000), ("mp4", "aac", 44100), ("flv", "aac", 44100)], ids=str
)
def test_sound_alone_that_starts_late(kind):
    ((start, _),) = heard(load_audio(record(*kind, Track(start_s=5.0))))
    assert start == pytest.approx(5.0, abs=CLOSE_S)


@pytest.mark.parametrize("kind", [("matroska", "flac", 48000), ("mpegts", "mp2", 48000)], ids=str)
def test_a_piece_of_something_longer_starts_at_0(kind):
    """A later hour of a broadcast or of a live stream: nobody wants an hour of silence ahead of it."""
    ((start, end),) = heard(load_audio(record(*kind, Track(start_s=4000.0))))
    assert (start, end) == pytest.approx((0.0, 2.0), abs=CLOSE_S)


def test_a_piece_of_something_longer_keeps_the_delay_between_picture_and_sound():
    data = record("mpegts", "mp2", 48000, Track(start_s=101.0), has_picture=True, first_picture_s=100.0)
    ((start, _),) = heard(load_audio(data))
    assert start == pytest.approx(1.0, abs=CLOSE_S)


@pytest.mark.parametrize("options", [{}, {"live": "1"}])
def test_packets_left_out_in_silence_do_not_shorten_the_recording(options):
    """Opus DTX: whole files were refused, live ones came out a third shorter."""
    data = record("webm", "libopus", 48000, Track(keep=lambda i: not 30 <= i < 70), options=options)
    first, second = heard(load_audio(data))
    assert second[0] - first[1] == pytest.approx(0.8, abs=CLOSE_S)
    assert second[1] == pytest.approx(2.0, abs=CLOSE_S)
    data = record("webm", "libopus", 48000, Track(keep=lambda i: i % 3 or i < 3), options=options)
    assert len(load_audio(data)) / 16000 == pytest.approx(2.0, abs=CLOSE_S)


@pytest.mark.parametrize("kind", TIMED, ids=str)
def test_a_cut_file_with_a_late_start_is_still_an_error(kind):
    data = record(*kind, Track(duration_s=4.0, start_s=1.0))
    for part in (0.2, 0.5, 0.8, 0.97):
        if (
            kind[0] in ("mpegts", "mpeg")
            and int(len(data) * part) % (188 if kind[0] == "mpegts" else 2048) == 0
        ):
            continue  # between two packets nothing shows that there were more
        with pytest.raises(AudioError):
            load_audio(data[: int(len(data) * part)])


def test_a_hole_in_matroska_is_an_error_and_no_silence():
    """Time stamps alone would make a pause of it."""
    data = bytearray(record("matroska", "pcm_s16le", 48000, Track(duration_s=3.0)))
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    with pytest.raises(AudioError, match="no element of Matroska starts at byte"):
        load_audio(bytes(data))


def test_two_webm_files_in_one_are_heard_one_behind_the_other():
    one, other = record("webm", "libopus", 48000), record("webm", "libopus", 48000, Track(duration_s=1.0))
    ((start, end),) = heard(load_audio(one + other))
    assert (start, end) == pytest.approx((0, 3), abs=CLOSE_S)


def frames(times, num_samples=960, rate=48000):
    """Frames of noise with these time stamps, numbered by their level."""
    rng = np.random.default_rng(0)
    for time_s in times:
        yield Frame(time_s, rate, rng.standard_normal((1, num_samples)).astype(np.float32))


def placed(times, **kind):
    """Where the frames came to lie, in seconds, each beside its time stamp; for those that are whole."""
    position, found = 0.0, []
    for frame in Timeline(0.0, "clip").place(frames(times, **kind)):
        if frame.time_s is not None:  # no silence
            found.append((position, frame.time_s))
        position += frame.duration_s
    return np.array(found)


@pytest.mark.parametrize("ppm", [-300, 300, -2000, 2000])
def test_a_clock_that_drifts_stays_within_50_ms_for_two_hours(ppm):
    num = int(2 * 3600 / 0.1)
    found = placed([i * 0.1 * (1 + ppm * 1e-6) for i in range(num)], num_samples=100, rate=1000)
    assert np.abs(found[:, 0] - found[:, 1]).max() < 0.051
    assert len(found) > 0.9 * num
    assert found[-1, 0] > 7000


def test_time_stamps_that_tremble_change_nothing():
    """A live recorder stamps packets when they arrive, some of them late."""
    rng = np.random.default_rng(0)
    times = np.arange(500) * 0.02 + np.where(rng.random(500) < 0.2, rng.random(500) * 0.15, 0)
    originals = list(frames(times.tolist()))
    result = list(Timeline(0.0, "clip").place(iter(originals)))
    assert [id(frame.samples) for frame in result] == [id(frame.samples) for frame in originals]


def test_a_jump_of_days_is_no_silence():
    times = itertools.chain(np.arange(50) * 0.02, 1e6 + np.arange(50) * 0.02)
    timeline = Timeline(0.0, "clip")
    with pytest.warns(AudioFlamingoWarning, match=r"time stamps jump by 999999\.0 s at 1\.0 s"):
        total_s = sum(frame.duration_s for frame in timeline.place(frames(times)))
    assert total_s == pytest.approx(2.0)


def test_frames_without_time_stamps_follow_each_other():
    found = list(Timeline(0.0, "clip").place(frames([None] * 50)))
    assert len(found) == 50


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "opus", "m4a", "aac"])
def test_files_without_gaps_are_as_they_were(kind):
    clip = tone(1.0, 48000)
    with_clock = load_audio(encode(clip, 48000, kind))
    assert np.abs(with_clock[8000:12000]).max() > 0.2
    assert abs(len(with_clock) - 16000) < 1100
