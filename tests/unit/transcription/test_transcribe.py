"""Long transcription around a scripted model, and around the tiny one where its numbers matter."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.audio.loading import SAMPLING_RATE, load_audio
from audioflamingo.engine.loops import find_loop
from audioflamingo.errors import ArgumentError, AudioError, AudioFlamingoWarning
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription import Finished, Segment, transcribe, transcribe_all
from audioflamingo.transcription.transcription_options import TranscriptionOptions
from tests.support.audio_files import encode
from tests.support.scripted_model import Script, ScriptedModel, framed, tiny_processor
from tests.support.tiny_model import tiny_model

DATA = Path(__file__).parents[2] / "data"
LOOP = "the audio is the " * 400


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return tiny_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(DATA / "directory_prompt.flac")


def say(text: str) -> Script:
    return lambda seconds, attempt: framed(text)


def counting(count: int) -> str:
    """An answer of some length that does not repeat itself."""
    return " ".join(map(str, range(count)))


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLING_RATE), np.float32)


def talk(speech: np.ndarray, *starts_s: float) -> np.ndarray:
    """3 s of speech at each of the given times."""
    waveform = silence(max(starts_s) + 5)
    for start_s in starts_s:
        waveform[int(start_s * SAMPLING_RATE) :][: 3 * SAMPLING_RATE] += speech[: 3 * SAMPLING_RATE]
    return waveform


def test_segments_have_text_without_its_frame_and_true_times(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    model = ScriptedModel(processor, say("hello world. It is me."))
    segments = list(transcribe(model, processor, talk(speech, 4.0, 60.0, 241.0)))
    assert [s.text for s in segments] == ["hello world. It is me."] * 3
    assert [s.start_s for s in segments] == pytest.approx([4.0, 60.0, 241.0], abs=0.3)
    assert [s.end_s - s.start_s for s in segments] == pytest.approx([3.0] * 3, abs=0.6)
    assert [len(call) for call in model.calls] == [3]
    first = segments[0]
    assert (first.finish_reason, first.flags) == ("stop", ())
    assert first.avg_logprob == pytest.approx(-0.5, abs=1e-4)
    assert processor.decode(list(first.tokens), True, True) == first.text


def test_silence_gives_nothing_and_does_not_wake_the_model(processor: AudioFlamingo3Processor) -> None:
    model = ScriptedModel(processor, say("thank you for watching"))
    assert list(transcribe(model, processor, silence(120))) == []
    assert model.calls == []


def test_a_transcript_that_never_had_a_frame_keeps_its_full_stop(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    model = ScriptedModel(processor, lambda seconds, attempt: "It is me.")
    assert [s.text for s in transcribe(model, processor, speech)] == ["It is me."]


def test_thoughts_are_no_part_of_a_transcript(processor: AudioFlamingo3Processor, speech: np.ndarray) -> None:
    model = ScriptedModel(
        processor, lambda seconds, attempt: "<think>They say it.</think>" + framed("It is me.")
    )
    assert [s.text for s in transcribe(model, processor, speech)] == ["It is me."]


def test_words_that_were_not_heard_are_flagged(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    (segment,) = transcribe(ScriptedModel(processor, say("")), processor, speech)
    assert (segment.text, segment.flags) == ("", ("no_words",))


def test_a_loop_is_tried_again_with_repetition_forbidden(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    def script(seconds: float, attempt: int) -> str:
        return framed("hello") if attempt else LOOP

    model = ScriptedModel(processor, script)
    (segment,) = transcribe(model, processor, speech)
    assert (segment.text, segment.finish_reason, segment.flags) == ("hello", "stop", ("retried",))
    assert model.num_steps < 150  # and not 500: the loop is noticed while it grows


def test_a_loop_that_stays_is_tried_in_halves(processor: AudioFlamingo3Processor, speech: np.ndarray) -> None:
    model = ScriptedModel(processor, lambda seconds, attempt: LOOP if seconds > 8 else framed("hello"))
    first, second = transcribe(model, processor, speech)
    assert (first.text, second.text) == ("hello", "hello")
    assert "split" in first.flags
    assert "split" in second.flags
    assert first.end_s == second.start_s


def test_a_loop_that_nothing_mends_is_cut_and_flagged(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    model = ScriptedModel(processor, lambda seconds, attempt: "hello world " + LOOP)
    segments = list(transcribe(model, processor, speech[: 3 * SAMPLING_RATE]))
    (segment,) = segments
    assert segment.finish_reason == "loop"
    assert segment.text == "hello world the audio is the"


def test_an_answer_that_is_not_finished_is_tried_in_halves(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    words = " ".join(f"{n} the content" for n in range(12))
    model = ScriptedModel(processor, lambda seconds, attempt: words if seconds > 8 else "hello")
    segments = list(transcribe(model, processor, speech, max_new_tokens=20))
    assert [s.text for s in segments] == ["hello", "hello"]
    (segment,) = transcribe(model, processor, speech, max_new_tokens=20, min_split_s=30)
    assert segment.finish_reason == "length"
    assert len(segment.tokens) == 20


def test_a_window_that_ends_makes_room_for_the_next_at_once(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    """Two run at a time: beside the long answer the three short ones follow each other."""
    model = ScriptedModel(processor, lambda seconds, attempt: counting(80 if seconds > 8 else 15))
    waveform = np.concatenate([speech, talk(speech, 3.0, 9.0, 15.0)])
    segments = list(transcribe(model, processor, waveform, batch_size=2))
    assert len(segments) == 4
    assert [len(call) for call in model.calls] == [2, 1, 1]
    assert model.num_steps < 1.2 * max(len(segment.tokens) for segment in segments)


def test_one_loop_does_not_stop_the_others(processor: AudioFlamingo3Processor, speech: np.ndarray) -> None:
    def script(seconds: float, attempt: int) -> str:
        return LOOP if seconds < 8 and not attempt else framed("a helpful " + "x y z " * 3)

    waveform = np.concatenate([talk(speech, 1.0), speech])
    first, second = transcribe(ScriptedModel(processor, script), processor, waveform)
    assert first.flags == ("retried",)
    assert second.text.startswith("a helpful x y z")
    assert second.flags == ()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], None),
        ([1] * 12, None),  # no no no no
        ([5, *[1] * 30], 2),
        ([1, 2, 3] * 3, None),
        ([9, 9, 8, *[1, 2, 3] * 20, 7], 6),
        (list(range(200)), None),
        ([*range(40), *list(range(100, 120)) * 3], 60),
        ([*range(40), *list(range(100, 120)) * 2], None),
    ],
)
def test_what_a_loop_is(tokens: list[int], expected: int | None) -> None:
    assert find_loop(tokens) == expected


def test_random_tokens_are_no_loop() -> None:
    """With 10 kinds of token, a run of 16 repeats by chance once in 10^11 answers."""
    generator = np.random.default_rng(0)
    assert all(find_loop(generator.integers(0, 10, 500).tolist()) is None for _ in range(20))


def test_windows_of_several_sources_run_together(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    model = ScriptedModel(processor, say("hello"))
    sources = [talk(speech, 1.0, 10.0), silence(3), talk(speech, 2.0), talk(speech, 1.0, 10.0)]
    events = list(transcribe_all(model, processor, sources, batch_size=3))
    assert [len(call) for call in model.calls] == [3, 2]  # all answers are equally long
    kinds = [(index, type(event)) for index, event in events]
    expected = [(0, Segment), (0, Segment), (0, Finished), (1, Finished), (2, Segment), (2, Finished)]
    assert kinds == [*expected, (3, Segment), (3, Segment), (3, Finished)]
    assert [event.duration_s for _, event in events if isinstance(event, Finished)] == [15, 3, 7, 15]


def test_a_source_that_fails_fails_alone(
    processor: AudioFlamingo3Processor, speech: np.ndarray, tmp_path: Path
) -> None:
    model = ScriptedModel(processor, say("hello"))
    sources = [speech, tmp_path / "nowhere.wav", b"not audio", speech]
    ends = {i: e.error for i, e in transcribe_all(model, processor, sources) if isinstance(e, Finished)}
    assert ends[0] is None
    assert ends[3] is None
    assert isinstance(ends[1], AudioError)
    assert "nowhere.wav" in str(ends[1])
    assert isinstance(ends[2], AudioError)


def test_beam_search_gives_the_segments_of_generate(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    model = tiny_model(seed=3)
    wanted = {"use_vad": False, "max_new_tokens": 12, "retry_ngram_size": 0, "min_split_s": 30.0}
    (greedy,) = transcribe(model, processor, speech, **wanted)
    (beams,) = transcribe(model, processor, speech, num_beams=3, **wanted)
    assert beams.tokens != greedy.tokens
    inputs = processor.apply_transcription_request(audio=speech)
    output = model.generate(
        **inputs, max_new_tokens=12, num_beams=3, return_dict_in_generate=True, output_logprobs=True
    )
    (length,) = output.num_new_tokens
    assert beams.tokens == tuple(output.sequences[0, inputs["input_ids"].shape[1] :].tolist()[:length])
    assert beams.avg_logprob == pytest.approx(float(output.logprobs.sum()) / length, rel=1e-5)
    assert beams.finish_reason == "length"
    model.generation_config.num_beams = 3
    assert list(transcribe(model, processor, speech, **wanted)) == [beams]
    assert list(transcribe(model, processor, speech, num_beams=1, **wanted)) == [greedy]


@pytest.mark.parametrize("num_beams", [0, 1.5, True, "2"])
def test_beams_are_a_whole_number(num_beams: Any) -> None:
    with pytest.raises(ArgumentError, match="num_beams must be a whole number"):
        TranscriptionOptions(num_beams=num_beams)


def test_a_window_that_the_model_refuses_fails_its_source_only(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    class Refusing(ScriptedModel):
        def get_audio_features(self, features: torch.Tensor, mask: torch.Tensor) -> Any:
            if mask.sum(1).max() > 800:
                raise ArgumentError("too long for me")
            return super().get_audio_features(features, mask)

    model = Refusing(processor, say("hello"))
    sources = [talk(speech, 1.0), speech, talk(speech, 1.0)]
    events = list(transcribe_all(model, processor, sources))
    ends = [(index, str(event.error)) for index, event in events if isinstance(event, Finished)]
    assert ends == [(0, "None"), (1, "too long for me"), (2, "None")]
    assert [index for index, event in events if isinstance(event, Segment)] == [0, 2]


def test_a_file_that_breaks_off_gives_what_it_has_then_an_error(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    whole = encode(np.concatenate([speech] * 3)[:, None], SAMPLING_RATE, "flac")
    damaged = bytearray(whole)
    damaged[-2000:-1000] = bytes(1000)
    segments = transcribe(
        ScriptedModel(processor, say("hello")), processor, io.BytesIO(bytes(damaged)), batch_size=1
    )
    assert next(segments).text == "hello"
    with pytest.raises(AudioError):
        list(segments)


def test_memory_that_runs_out_halves_the_batch(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    class Small(ScriptedModel):
        def get_audio_features(self, features: torch.Tensor, mask: torch.Tensor) -> Any:
            if len(features) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().get_audio_features(features, mask)

    model = Small(processor, say("hello"))
    with pytest.warns(AudioFlamingoWarning, match="going on with 2"):
        segments = list(transcribe(model, processor, talk(speech, 0, 5, 10, 15), batch_size=4))
    assert len(segments) == 4
    assert [len(call) for call in model.calls] == [2, 2]


def test_arrays_have_the_rate_that_is_stated(processor: AudioFlamingo3Processor, speech: np.ndarray) -> None:
    model = ScriptedModel(processor, say("hello"))
    slow = np.repeat(speech, 2)
    (segment,) = transcribe(model, processor, slow, sampling_rate=32000)
    assert segment.end_s <= len(speech) / SAMPLING_RATE


def test_progress_counts_the_audio_that_was_read(processor: AudioFlamingo3Processor) -> None:
    seen: list[float] = []
    list(transcribe(ScriptedModel(processor, say("x")), processor, silence(30), on_progress=seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == 30


def test_a_few_samples_are_enough_without_voice_detection(processor: AudioFlamingo3Processor) -> None:
    model = ScriptedModel(processor, say("hello"))
    (segment,) = transcribe(model, processor, np.full(100, 0.5, np.float32), use_vad=False)
    assert (segment.start_s, segment.end_s) == (0, 100 / SAMPLING_RATE)


def test_unknown_and_impossible_options_are_refused_at_once(processor: AudioFlamingo3Processor) -> None:
    with pytest.raises(ArgumentError, match="did you mean 'batch_size'"):
        transcribe(None, processor, b"", batchsize=3)
    with pytest.raises(ArgumentError, match="batch_size must be a whole number"):
        transcribe(None, processor, b"", batch_size=0)


def test_batched_segments_are_those_of_each_window_alone(
    processor: AudioFlamingo3Processor, speech: np.ndarray
) -> None:
    model = tiny_model(seed=3)
    waveform = np.concatenate([talk(speech, 1.0, 7.0), speech])
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_split_s": 30.0}
    together = list(transcribe(model, processor, waveform, batch_size=8, **settings))
    alone = list(transcribe(model, processor, waveform, batch_size=1, **settings))
    assert len(together) == 3
    assert [s.tokens for s in together] == [s.tokens for s in alone]
    assert [s.avg_logprob for s in together] == pytest.approx([s.avg_logprob for s in alone], abs=1e-4)
