"""Which sound of a file is heard, and that it is said where none is."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audioflamingo.audio import load_audio
from audioflamingo.audio.loading import SAMPLING_RATE, stream_channels
from audioflamingo.audio.reading import Reading
from audioflamingo.cli import transcribe_job
from audioflamingo.errors import ArgumentError, AudioError, AudioFlamingoWarning
from audioflamingo.transcription import TranscriptionOptions, format_transcript, transcribe
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.windows import cut_windows
from tests.support.audio_files import encode, tone
from tests.support.cli_runs import af3
from tests.support.recordings import Track, heard, record
from tests.support.scripted_model import ScriptedModel, framed, tiny_processor

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(DATA / "directory_prompt.flac")[: 3 * SAMPLING_RATE]


@pytest.fixture
def model(tmp_path_factory, monkeypatch):
    processor = tiny_processor(tmp_path_factory.mktemp("processor"))
    model = ScriptedModel(processor, lambda seconds, attempt: framed(f"{seconds:.1f} s"))
    monkeypatch.setattr(transcribe_job, "load_with_adapter", lambda *_: (model, processor, None))
    model.processor = processor
    return model


@pytest.mark.parametrize("kind", ["wav", "wav_u8", "flac", "m4a", "opus"])
def test_one_inverted_side_does_not_cancel_the_other(kind):
    clip = tone(1.0, 48000)
    stereo = np.concatenate([clip, -0.98 * clip], axis=1)
    with pytest.warns(
        AudioFlamingoWarning, match=r"cancel each other .* dB weaker|cancel each other .* silent"
    ):
        both = load_audio(encode(stereo, 48000, kind))
    one = load_audio(encode(clip, 48000, kind))
    size = min(len(one), len(both)) - 2000
    tolerance = {"wav_u8": 0.02, "m4a": 0.05, "opus": 0.05}.get(kind, 1e-4)
    np.testing.assert_allclose(both[2000:size], one[2000:size], atol=tolerance)


def test_inverted_arrays_too():
    clip = tone(1.0)[:, 0]
    with pytest.warns(AudioFlamingoWarning, match=r"in 1\.0 of 1\.0 s their mean is silent"):
        np.testing.assert_array_equal(load_audio(np.stack([clip, -clip])), clip)


def test_only_where_they_cancel():
    clip = tone(4.0)[:, 0]
    other = np.where(np.arange(len(clip)) < 2 * 16000, clip, -clip)
    with pytest.warns(AudioFlamingoWarning, match=r"in 2\.0 of 4\.0 s"):
        mixed = load_audio(np.stack([clip, other]))
    assert np.abs(np.diff(mixed)).max() < 0.2  # no click where it changes
    is_changing = slice(32000, 32160)  # 10 ms
    mixed[is_changing] = clip[is_changing]
    np.testing.assert_allclose(mixed, clip, atol=1e-6)


@pytest.mark.filterwarnings("error", "ignore:audio array of shape .* this is heard as one clip of")
@pytest.mark.parametrize("num_channels", [2, 6, 12])
def test_ordinary_channels_are_averaged(num_channels):
    """Unlike ones, alike ones, and one alone among silent ones, whose mean is weak but all there is."""
    rng = np.random.default_rng(0)
    unlike = rng.standard_normal((num_channels, 20000)).astype(np.float32) / 10
    alone = unlike * (np.arange(num_channels) == 1)[:, None]
    alike = np.repeat(unlike[:1], num_channels, axis=0)
    for channels in (unlike, alone, alike):
        np.testing.assert_array_equal(load_audio(channels), channels.mean(axis=0))


def test_sides(tmp_path):
    left, right = tone(1.0)[:, 0], 0.5 * tone(1.0)[:, 0][::-1]
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", channel="left"), left)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", channel="right"), right)
    np.testing.assert_array_equal(load_audio(np.stack([left, right]), channel="right"), right)
    (both,) = stream_channels(np.stack([left, right]), reading=Reading(channel="each"))
    np.testing.assert_array_equal(both, np.stack([left, right]))
    with pytest.raises(AudioError, match="one channel, neither left nor right"):
        load_audio(left, channel="left")
    with pytest.raises(ArgumentError, match="channel='each' gives one transcript"):
        load_audio(left, channel="each")
    with pytest.raises(ArgumentError, match="one of mix, left, right, each"):
        load_audio(left, channel="centre")
    with pytest.warns(AudioFlamingoWarning, match="it holds sound .* but what is heard of it is silent"):
        load_audio(np.stack([left, 0 * left]), channel="right")


def film(*tracks: Track, kind: tuple[str, str, int] = ("matroska", "aac", 48000)) -> bytes:
    return record(*kind, *tracks, has_picture=True)


def test_the_default_track_is_heard_and_named():
    data = film(Track(level=0, is_default=False), Track(about=(("language", "eng"), ("title", "Main"))))
    with pytest.warns(
        AudioFlamingoWarning,
        match=r"has 2 audio tracks: 1 \(aac\), 2 \(aac, eng, 'Main', default\)\. Track 2 is heard",
    ):
        assert len(heard(load_audio(data))) == 1
    assert heard(load_audio(data, track=1)) == []
    with pytest.raises(AudioError, match=r"no audio track 3 .* 2 \(aac, eng, 'Main', default\)"):
        load_audio(data, track=3)


@pytest.mark.filterwarnings("ignore::audioflamingo.errors.AudioFlamingoWarning")
def test_without_a_default_the_first_is_heard():
    tracks = Track(is_default=False), Track(level=0, is_default=False)
    assert len(heard(load_audio(film(*tracks)))) == 1
    assert len(heard(load_audio(film(*tracks, kind=("mpegts", "mp2", 48000))))) == 1


@pytest.mark.filterwarnings("error")
def test_one_track_is_not_worth_a_word():
    load_audio(film(Track()))
    with pytest.raises(ArgumentError, match="track must be a whole number of at least 1"):
        load_audio(film(Track()), track=0)
    with pytest.raises(ArgumentError, match="array, which has no tracks"):
        load_audio(tone()[:, 0], track=1)


def test_each_channel_has_its_transcript_in_the_order_of_time(speech, model):
    silence = np.zeros(2 * SAMPLING_RATE, np.float32)
    left = np.concatenate([speech, silence, silence, speech])
    right = np.concatenate([silence, silence, speech, silence, silence])[: len(left)]
    call = np.stack([left, np.pad(right, (0, len(left) - len(right)))])
    segments = list(transcribe(model, model.processor, call, channel="each"))
    assert [segment.channel for segment in segments] == ["left", "right", "left"]
    starts = [segment.start_s for segment in segments]
    assert starts == sorted(starts)
    assert starts[1] == pytest.approx(4.0 + starts[0], abs=0.4)
    mono = list(transcribe(model, model.processor, left, channel="each"))
    assert [segment.channel for segment in mono] == [None, None]


def test_windows_of_channels_come_in_order_and_are_those_of_the_channel_alone(speech):
    rng = np.random.default_rng(0)
    loud = np.tile(speech, 14)
    other = np.concatenate([np.zeros(5 * SAMPLING_RATE, np.float32), loud[: -5 * SAMPLING_RATE]])
    both = np.stack([loud, other])
    options = TranscriptionOptions()
    cuts = np.sort(rng.integers(0, both.shape[1], 20))
    windows = list(cut_windows(np.split(both, cuts, axis=1), options))
    assert [w.start for w in windows] == sorted(w.start for w in windows)
    for name, samples in (("left", loud), ("right", other)):
        alone = list(cut_windows([samples], options))
        of_channel = [w for w in windows if w.channel == name]
        assert [(w.start, len(w.waveform)) for w in of_channel] == [(w.start, len(w.waveform)) for w in alone]


def test_formats_name_the_channel():
    segments = [Segment(0, 1, "good <day>", channel="left"), Segment(0.5, 2, "hello", channel="right")]
    assert format_transcript(segments, "txt") == "left: good <day>\nright: hello\n"
    assert "\nleft: good <day>\n" in format_transcript(segments, "srt")
    assert "\n<v right>hello\n" in format_transcript(segments, "vtt")
    assert "500\t2000\tright: hello\n" in format_transcript(segments, "tsv")
    content = json.loads(format_transcript(segments, "json"))
    assert content["text"] == "left: good <day>\nright: hello"
    assert [segment["channel"] for segment in content["segments"]] == ["left", "right"]
    assert "channel" not in Segment(0, 1, "x").to_dict()


def test_it_is_said_that_there_is_no_speech(tmp_path, model, speech):
    soundfile.write(tmp_path / "quiet.wav", np.zeros(32000), 16000)
    soundfile.write(tmp_path / "speech.wav", speech, 16000)
    result = af3("transcribe", tmp_path / "quiet.wav", tmp_path / "speech.wav", "-f", "jsonl")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "no speech" in line]
    assert line.endswith("quiet.wav: no speech was found in 2.0 s of audio.")
    for name, expected in (("quiet.wav", True), ("speech.wav", False)):
        result = af3("transcribe", tmp_path / name, "-f", "json", "-q")
        assert json.loads(result.stdout)["no_speech"] is expected
        assert result.stderr == ""


def test_flags_choose_what_is_heard(tmp_path, model, speech):
    soundfile.write(tmp_path / "call.wav", np.stack([speech, np.roll(speech, 24000)], axis=1), 16000)
    result = af3("transcribe", tmp_path / "call.wav", "--channel", "each")
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["left", "right"]
    assert af3("transcribe", tmp_path / "call.wav", "--channel", "left").stdout.startswith("3.")
    result = af3("transcribe", tmp_path / "call.wav", "--track", "2")
    assert (result.exit_code, "no audio track 2" in result.stderr) == (1, True)
    assert af3("transcribe", tmp_path / "call.wav", "--channel", "up").exit_code == 2
    result = af3("inspect", tmp_path / "call.wav", "--channel", "right", "--no-png", "--json")
    assert json.loads(result.stdout)["num_channels"] == 2


def test_a_damaged_file_on_request(tmp_path, model, speech):
    (tmp_path / "cut.wav").write_bytes(encode(speech[:, None], 16000, "wav")[:-20000])
    result = af3("transcribe", tmp_path / "cut.wav")
    assert (result.exit_code, "--allow-damaged" in result.stderr) == (1, True)
    result = af3("transcribe", tmp_path / "cut.wav", "--allow-damaged")
    assert (result.exit_code, result.stdout) == (0, "2.4 s\n")
    assert "(20000 bytes are missing)" in result.stderr


def test_a_pipe_on_the_command_line(tmp_path, model, speech):
    """The bar looked at its head, and left nothing."""
    for command in (("transcribe",), ("inspect", "--no-png")):
        pipe = tmp_path / f"{command[0]}.fifo"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_bytes, args=(encode(speech[:, None], 16000, "flac"),))
        writer.start()
        result = af3(*command, pipe)
        writer.join()
        assert result.exit_code == 0, result.stderr
