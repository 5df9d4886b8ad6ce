"""`on_long="windows"`: each stretch of a long recording is asked, then one question about their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audioflamingo import Chat
from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.errors import ArgumentError, PromptError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.stretches import LongQuestion, cut_stretches, long_question
from tests.support.audio_files import tone
from tests.support.cli_runs import af3, write_tiny_model
from tests.support.scripted_model import ScriptedModel, tiny_processor

MAX_S = 30


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    processor = tiny_processor(tmp_path_factory.mktemp("processor"))
    processor.max_audio_len = MAX_S
    return processor


def recording(duration_s: float) -> np.ndarray:
    return tone(duration_s)[:, 0]


def script(seconds: float, attempt: int) -> str:
    return f"<think>so</think>heard {attempt}" if seconds else "all of it"


def test_each_stretch_is_asked_and_then_all_of_them(processor: AudioFlamingo3Processor) -> None:
    model: Any = ScriptedModel(processor, script)
    told = []
    chat = Chat(model, processor, on_long="windows", on_stretch=told.append)
    chat.add_audio(recording(75.0))
    assert "".join(chat.ask("What is it?", max_new_tokens=60)) == "all of it"
    assert model.calls == [[pytest.approx(25.0, abs=2.6)]] * 3 + [[0.0]]
    assert chat.stretches == told
    assert [stretch.answer for stretch in told] == ["heard 0"] * 3  # without its thoughts
    assert [stretch.clip for stretch in told] == [1, 1, 1]
    assert told[0].start_s == 0
    assert told[-1].end_s == 75.0
    assert [s.start_s for s in told[1:]] == [s.end_s for s in told[:-1]]
    assert [part["type"] for part in chat.messages[0]["content"]] == ["audio", "text"]  # as it was asked
    assert chat.messages[1]["content"] == "all of it"
    later = Chat(model, processor, on_long="windows")  # the scripted model knows no prompt that goes on
    later.messages = chat.messages
    "".join(later.ask("And now?", max_new_tokens=60))  # about the recording, too: it is heard again
    assert len(model.calls) == 8
    assert model.calls[-1] == [0.0]


def test_what_the_model_can_hear_at_once_it_hears_at_once(processor: AudioFlamingo3Processor) -> None:
    model: Any = ScriptedModel(processor, script)
    chat = Chat(model, processor, on_long="windows")
    chat.add_audio(recording(MAX_S))
    "".join(chat.ask("What is it?", max_new_tokens=60))
    assert model.calls == [[pytest.approx(MAX_S)]]
    assert chat.stretches == []


def test_a_stretch_that_fails_leaves_the_conversation(processor: AudioFlamingo3Processor) -> None:
    def fails(seconds: float, attempt: int) -> str:
        raise PromptError("no")

    model: Any = ScriptedModel(processor, fails)
    chat = Chat(model, processor, on_long="windows")
    chat.add_audio(recording(40.0))
    with pytest.raises(PromptError):
        "".join(chat.ask("What is it?"))
    assert chat.messages == []
    model._script = script
    assert "".join(chat.ask("What is it?", max_new_tokens=60)) == "all of it"


def test_other_words_are_refused(processor: AudioFlamingo3Processor) -> None:
    with pytest.raises(
        ArgumentError, match="on_long='window': it must be one of 'truncate', 'error', 'windows'"
    ):
        Chat(ScriptedModel(processor, script), processor, on_long="window")  # type: ignore[arg-type]


def audio(waveform: np.ndarray) -> dict[str, Any]:
    return {"type": "audio", "audio": waveform}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_what_is_asked() -> None:
    short, long, longer = recording(5.0), recording(40.0), recording(65.0)
    long[round(18.0 * SAMPLING_RATE) : round(18.2 * SAMPLING_RATE)] = 0  # a pause
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [audio(long)]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [audio(short), audio(longer), text("Which "), text("one?")]},
    ]
    question = LongQuestion(messages, MAX_S)
    asked = question.conversations()
    assert len(asked) == 2 + 3
    for conversation in asked:
        assert conversation[0] == messages[0]
        assert conversation[2] == messages[2]
        assert conversation[3]["content"][0]["audio"] is short
        assert conversation[3]["content"][-2:] == [text("Which "), text("one?")]
    assert [len(c[3]["content"]) for c in asked] == [3, 3, 4, 4, 4]  # one long clip at a time
    assert asked[2][1]["content"] == [text("(a recording)")]
    heard = [asked[0][1]["content"][0]["audio"], asked[1][1]["content"][0]["audio"]]
    np.testing.assert_array_equal(np.concatenate(heard), long)
    np.testing.assert_array_equal(np.concatenate([c[3]["content"][1]["audio"] for c in asked[2:]]), longer)

    stretches = [question.stretch(index, f"answer\n{index}") for index in range(5)]
    final = question.final(stretches)
    assert final[:3] == [messages[0], {"role": "user", "content": [text("(a recording)")]}, messages[2]]
    kept, words = final[3]["content"]
    assert kept["audio"] is short
    lines = words["text"].splitlines()
    assert lines[0] == "Which one?"
    assert lines[3] == f"[clip 1, {stretches[0].times}] answer 0"
    assert stretches[0].times == "00:00:00 - 00:00:18"
    assert lines[7].startswith("[clip 3, 00:00:4")
    assert lines[7].endswith("- 00:01:05] answer 4")
    assert lines[-1] == "From these, give one answer for the whole recording."


def test_no_question_and_no_long_clip() -> None:
    said = [{"role": "user", "content": [audio(recording(31))]}, {"role": "assistant", "content": "So"}]
    with pytest.raises(PromptError, match="the last message must be the user's"):
        long_question(said, MAX_S)
    assert long_question([{"role": "user", "content": [audio(recording(30))]}], MAX_S) is None


def test_stretches_end_in_pauses() -> None:
    waveform = np.ones(100 * SAMPLING_RATE, np.float32)
    waveform[round(47.0 * SAMPLING_RATE) : round(47.2 * SAMPLING_RATE)] = 0
    first, second = cut_stretches(waveform, 60 * SAMPLING_RATE)
    assert 46.9 < first.stop / SAMPLING_RATE < 47.3
    assert (first.start, second.start, second.stop) == (0, first.stop, len(waveform))
    for seconds, most in ((60.01, 30), (90, 30), (600.5, 60)):
        parts = cut_stretches(waveform[:1].repeat(round(seconds * 1000)), most * 1000)
        assert max(part.stop - part.start for part in parts) <= most * 1000
        assert len(parts) == -(-round(seconds * 1000) // (most * 1000))


def test_at_the_command_line(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**config, "max_audio_len": MAX_S}))
    soundfile.write(tmp_path / "long.wav", recording(31.0), SAMPLING_RATE)
    ask = ("ask", tmp_path / "long.wav", "What is it?", "--model", folder, "--max-new-tokens", 3)
    result = af3(*ask, "--on-long", "windows", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() == {"answer", "thoughts", "finish_reason", "stretches"}
    assert [(s["clip"], s["start_s"] == 0) for s in found["stretches"]] == [(1, True), (1, False)]
    assert found["stretches"][1]["end_s"] == 31.0
    lines = [line for line in result.stderr.splitlines() if line.startswith("[clip 1, 00:00:")]
    assert len(lines) == 2
    assert "[clip" not in af3(*ask, "--on-long", "windows", "--quiet").stderr
    assert "31.00 s; at most 30.00 s fit" in af3(*ask, "--on-long", "error").stderr
    assert json.loads(af3(*ask, "--json").stdout)["stretches"] == []
