"""Finding speech and cutting it: the network against its original, the cuts against what they promise."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audioflamingo.audio import vad
from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.audio.vad import VAD_FRAME, SpeechDetector, frames_of
from audioflamingo.errors import ArgumentError, MissingDependencyError
from audioflamingo.transcription.transcription_options import TranscriptionOptions, VadOptions
from audioflamingo.transcription.windows import Window, WindowCutter, cut_windows, quietest

DATA = Path(__file__).parents[2] / "data"


def run_cutter(probabilities: list[float], options: VadOptions, block_frames: int = 7) -> list[Window]:
    """Windows of a waveform whose samples are their own index."""
    cutter = WindowCutter(options)
    waveform = np.arange(len(probabilities) * VAD_FRAME, dtype=np.float32)
    windows = []
    for start in range(0, len(probabilities), block_frames):
        scores = np.array(probabilities[start : start + block_frames], np.float32)
        windows += cutter.put(waveform[start * VAD_FRAME :][: len(scores) * VAD_FRAME], scores)
    return [*windows, *cutter.end()]


def test_the_network_gives_what_the_original_gives() -> None:
    waveform = load_audio(DATA / "directory_prompt.flac")[: 300 * VAD_FRAME]
    folder = importlib.util.find_spec("silero_vad").submodule_search_locations[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = torch.jit.load(f"{folder}/data/silero_vad.jit")
    frames = torch.from_numpy(waveform).split(VAD_FRAME)
    with torch.no_grad():
        expected = [original(frame, SAMPLING_RATE).item() for frame in frames]
    detector = SpeechDetector()
    found = np.concatenate(
        [detector(block) for block in np.split(waveform, [VAD_FRAME * 3, VAD_FRAME * 110])]
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_package_of_the_network_is_not_run() -> None:
    """Its import calls torch.set_num_threads(1), which would slow the model down."""
    vad.load_vad()
    assert "silero_vad" not in sys.modules


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    vad.load_vad.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install 'silero-vad"):
        vad.load_vad()
    vad.load_vad.cache_clear()


def test_another_network_in_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vad, "_read_scripted", lambda path: {})
    vad.load_vad.cache_clear()
    with pytest.raises(MissingDependencyError, match="holds another network"):
        vad.load_vad()
    vad.load_vad.cache_clear()


@pytest.mark.parametrize("level", [0.0, 1e-4, 0.05])
def test_silence_and_noise_are_not_speech(level: float) -> None:
    noise = np.random.default_rng(0).normal(0, 1, 20 * SAMPLING_RATE).astype(np.float32) * level
    assert list(cut_windows([noise], TranscriptionOptions())) == []


def test_speech_is_found_where_it_is() -> None:
    speech = load_audio(DATA / "directory_prompt.flac")
    silence = np.zeros(5 * SAMPLING_RATE, np.float32)
    (window,) = cut_windows([silence, speech, silence], TranscriptionOptions())
    assert 4.7 <= window.start_s <= 5.5
    assert 16 <= window.end_s <= 5 + len(speech) / SAMPLING_RATE + 0.2
    assert not window.is_cut


def test_without_voice_detection_only_digital_silence_is_left_out() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 3 * SAMPLING_RATE).astype(np.float32)
    silence = np.zeros(5 * SAMPLING_RATE, np.float32)
    windows = list(cut_windows([noise, silence, noise], TranscriptionOptions(use_vad=False)))
    assert [round(w.start_s) for w in windows] == [0, 8]
    assert list(cut_windows([silence], TranscriptionOptions(use_vad=False))) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0]), st.integers(1, 120)), max_size=30),
    st.sampled_from([(1.0, 0.0), (3.0, 200.0), (30.0, 200.0)]),
    st.sampled_from([30.0, 300.0, 2000.0]),
    st.integers(1, 64),
)
def test_windows_hold_all_speech_once_and_are_short_enough(
    runs: list[tuple[float, int]], lengths: tuple[float, float], min_silence_ms: float, block_frames: int
) -> None:
    probabilities = [p for p, count in runs for _ in range(count)]
    max_window_s, pad_ms = lengths
    options = VadOptions(
        max_window_s=max_window_s, pad_ms=pad_ms, min_silence_ms=min_silence_ms, min_speech_ms=0
    )
    windows = run_cutter(probabilities, options, block_frames)
    covered = np.zeros(len(probabilities) * VAD_FRAME, int)
    for window in windows:
        end = window.start + len(window.waveform)
        covered[window.start : end] += 1
        assert 0 < len(window.waveform) <= max_window_s * SAMPLING_RATE
        np.testing.assert_array_equal(window.waveform, np.arange(window.start, end, dtype=np.float32))
    assert covered.max(initial=0) <= 1
    for index, probability in enumerate(probabilities):
        if probability >= options.threshold:
            assert covered[index * VAD_FRAME : (index + 1) * VAD_FRAME].all()


def test_long_speech_is_cut_where_it_is_quietest() -> None:
    probabilities = [0.95] * 1500
    probabilities[700:710] = [0.55] * 10  # 22.4 s, within the last 10 s of the window
    first, second = run_cutter(probabilities, VadOptions())
    assert first.is_cut
    assert first.end_s == second.start_s == pytest.approx(22.56, abs=0.1)
    assert not second.is_cut


def test_stretches_share_a_window_with_the_pauses_between_them() -> None:
    second = SAMPLING_RATE / VAD_FRAME

    def track(*lengths_s: float) -> list[float]:
        """Speech and pauses by turns."""
        return [
            (0.9, 0.0)[i % 2] for i, length in enumerate(lengths_s) for _ in range(round(length * second))
        ]

    speech = track(2, 1.5, 3, 2.5, 4, 6, 2, 1)
    alone = run_cutter(speech, VadOptions())
    assert len(alone) == 4
    first, last = run_cutter(speech, VadOptions(max_pause_ms=3000))
    assert (first.start, first.end_s) == (alone[0].start, alone[2].end_s)
    np.testing.assert_array_equal(first.waveform, np.arange(first.start, first.start + len(first.waveform)))
    assert (last.start, last.end_s) == (alone[3].start, alone[3].end_s)
    # What does not fit is cut in the last pause, not in the middle of speech.
    parts = run_cutter(speech, VadOptions(max_pause_ms=3000, max_window_s=11))
    assert [(p.start, p.end_s) for p in parts] == [
        (alone[0].start, alone[1].end_s),
        *((window.start, window.end_s) for window in alone[2:]),
    ]
    assert not any(part.is_cut for part in parts)


def test_the_rest_of_cut_speech_is_kept_however_short() -> None:
    """A rest below `min_speech_ms` once fell away, and with it the last syllable."""
    options = VadOptions(max_window_s=3.0, min_speech_ms=400, cut_search_s=0.05)
    num_frames = 0
    while True:  # speech that ends just behind the first cut
        num_frames += 1
        windows = run_cutter([0.95] * num_frames + [0.0] * 200, options)
        if len(windows) == 2:
            break
    assert len(windows[1].waveform) < options.min_speech_ms * SAMPLING_RATE / 1000 + options.pad_ms * 16
    assert windows[1].start == windows[0].start + len(windows[0].waveform)


def test_a_cutter_holds_no_more_than_a_window_and_a_block() -> None:
    cutter = WindowCutter(VadOptions())
    block = np.zeros(256 * VAD_FRAME, np.float32)
    largest = 0
    for index in range(60):
        speech = np.full(256, 1.0 if index % 3 else 0.0, np.float32)
        list(cutter.put(block, speech))
        largest = max(largest, len(cutter._samples))
    assert largest <= 30 * SAMPLING_RATE + len(block) + VAD_FRAME


def test_short_noises_are_left_out() -> None:
    probabilities = [0.0] * 50 + [1.0] * 2 + [0.0] * 50 + [1.0] * 20 + [0.0] * 50
    (window,) = run_cutter(probabilities, VadOptions(min_speech_ms=100))
    assert window.start_s == pytest.approx(102 * 0.032 - 0.2, abs=0.033)


@given(st.lists(st.integers(0, 200_000), max_size=6))
@settings(max_examples=20, deadline=None)
def test_blocks_are_whole_frames_whatever_comes(lengths: list[int]) -> None:
    whole = np.arange(sum(lengths), dtype=np.float32)
    blocks = list(frames_of(np.split(whole, np.cumsum(lengths)[:-1]) if lengths else []))
    np.testing.assert_array_equal(np.concatenate([*blocks, whole[:0]]), whole)
    assert all(len(block) % VAD_FRAME == 0 for block in blocks[:-1])


def test_halves_are_cut_at_the_quiet_place() -> None:
    waveform = np.ones(10 * SAMPLING_RATE, np.float32)
    waveform[int(5.5 * SAMPLING_RATE) : 6 * SAMPLING_RATE] = 0
    first, second = Window(1600, waveform).halves()
    assert 5.5 <= first.end_s - 0.1 <= 6.0
    assert first.end_s == second.start_s
    assert len(first.waveform) + len(second.waveform) == len(waveform)
    assert quietest(np.array([1.0])) == 0


@pytest.mark.parametrize(
    "change",
    [{"threshold": 0}, {"end_threshold": 0.9}, {"max_window_s": 31}, {"pad_ms": -1}, {"min_silence_ms": 1e9}],
)
def test_impossible_options_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(change))):
        VadOptions(**change)
