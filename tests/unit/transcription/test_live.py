"""Speech while it is spoken: where it begins and ends, which words are shown early."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from audioflamingo.audio.live_audio import LiveAudio
from audioflamingo.errors import ArgumentError, AudioError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription import Segment
from audioflamingo.transcription.live import Agreement, Draft, LiveEar, SpeechStarted, listen
from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions
from audioflamingo.transcription.windows import Window, cut_windows
from tests.support.live_speech import NUMBERS, count_seconds, pcm, talk_with_pauses
from tests.support.scripted_model import ScriptedModel, tiny_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return tiny_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def talk() -> np.ndarray:
    return talk_with_pauses()


def pieces(waveform: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


@pytest.mark.parametrize("size", [100, 1600, 200_000])
def test_windows_are_those_of_a_recording_however_it_comes(talk: np.ndarray, size: int) -> None:
    ear = LiveEar(VadOptions())
    news = [item for piece in pieces(talk, size) for item in ear.put(piece)] + list(ear.flush())
    assert [type(item) for item in news] == [SpeechStarted, Window, SpeechStarted, Window]
    expected = list(cut_windows([talk], TranscriptionOptions()))
    found = [item for item in news if isinstance(item, Window)]
    assert [(w.start, len(w.waveform)) for w in found] == [(w.start, len(w.waveform)) for w in expected]
    assert [item.start for item in news] == [w.start for w in expected for _ in range(2)]
    assert ear.position == len(talk)


def test_what_is_flushed_in_the_middle_goes_on_at_its_place(talk: np.ndarray) -> None:
    ear = LiveEar(VadOptions())
    cut = 16000 * 3 + 77  # in the middle of speech and of a frame
    first = list(ear.put(talk[:cut])) + list(ear.flush())
    assert ear.position == cut
    rest = list(ear.put(talk[cut:])) + list(ear.flush())
    ends = [round(item.end_s, 1) for item in [*first, *rest] if isinstance(item, Window)]
    assert ends == pytest.approx([cut / 16000, 5.2, 10.3], abs=0.3)
    assert first[-1].end_s == cut / 16000  # nothing is added
    assert isinstance(rest[0], SpeechStarted)
    assert rest[0].start >= cut


def test_words_are_shown_once_two_hearings_agree() -> None:
    agreement = Agreement()
    heard = ["I see", "I sea the", "I sea the old", "You sea the old", "I sea the old man and"]
    assert [agreement.add(text) for text in heard] == ["", "I", " sea the", "", ""]
    assert agreement.add("I sea the old man and the sea") == " old man and"
    assert agreement.end("I sea the old man and the sea.") == " the sea."
    assert agreement.end("Something else") == ""


def test_drafts_then_segments(processor: AudioFlamingo3Processor, talk: np.ndarray) -> None:
    model: Any = ScriptedModel(processor, count_seconds)
    events = list(listen(model, processor, pieces(talk, 8000), draft_every_s=0.5))
    segments = [event for event in events if isinstance(event, Segment)]
    assert [s.text for s in segments] == [" ".join(NUMBERS[:4]), " ".join(NUMBERS[:3])]
    assert [s.start_s for s in segments] == pytest.approx([1.0, 7.0], abs=0.3)
    drafts = [event for event in events[: events.index(segments[0])] if isinstance(event, Draft)]
    texts = [draft.text for draft in drafts]
    assert len(texts) >= 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert segments[0].text.startswith(texts[-1])
    silent = list(listen(model, processor, pieces(talk, 8000), draft_every_s=None))
    assert silent == segments
    with pytest.raises(ArgumentError, match="wrong"):
        next(listen(model, processor, [], wrong=1))


def test_live_audio_resamples_without_a_seam() -> None:
    time_s = np.arange(24000) / 24000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time_s)
    audio = LiveAudio("pcm16", 24000)
    data = pcm(tone)
    got = np.concatenate([*(audio.put(data[i : i + 960]) for i in range(0, len(data), 960)), audio.end()])
    assert len(got) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(got - expected)[200:-200].max() < 1e-3
    with pytest.raises(AudioError, match="odd"):
        audio.put(b"abc")
    with pytest.raises(ArgumentError, match="mp3"):
        LiveAudio("mp3", 8000)  # type: ignore[arg-type]
