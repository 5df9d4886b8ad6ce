"""A conversation that keeps its cache says what one that starts anew would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.engine.chat import Chat
from audioflamingo.errors import ArgumentError, AudioError
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.audio_files import tone
from tests.support.scripted_model import tiny_processor
from tests.support.tiny_model import tiny_model

OPTIONS: dict[str, Any] = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return tiny_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model(seed=1)
    model.generation_config.eos_token_id = [497]
    return model


def clip(duration_s: float, gain: float = 1.0) -> np.ndarray:
    return tone(duration_s)[:, 0] * np.float32(gain)


def fresh_answer(model: Any, processor: AudioFlamingo3Processor, messages: list[dict[str, Any]]) -> str:
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    output = model.generate(**inputs, **OPTIONS)
    return processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_each_turn_answers_as_if_all_were_read_again(model: Any, processor: AudioFlamingo3Processor) -> None:
    chat = Chat(model, processor, system="You are a helpful assistant.")
    reused = []
    turns = [
        ([clip(2.0), clip(31.0)], "What is this?"),
        ([], "Why do you think so?"),
        ([clip(1.0, 0.5)], "and this"),
    ]
    for clips, question in turns:
        for waveform in clips:
            chat.add_audio(waveform)
        answer = "".join(chat.ask(question, **OPTIONS))
        assert answer == fresh_answer(model, processor, chat.messages[:-1])
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
        reused.append(chat.num_reused)
    assert reused[0] == 0
    assert reused[1] > 50 + 775  # both clips of the first turn
    assert reused[2] > reused[1]
    assert chat.num_clips == 3


def test_text_alone(model: Any, processor: AudioFlamingo3Processor) -> None:
    chat = Chat(model, processor)
    assert "".join(chat.ask("hello", **OPTIONS)) == fresh_answer(model, processor, chat.messages[:-1])
    assert "".join(chat.ask("hello world", **OPTIONS)) == fresh_answer(model, processor, chat.messages[:-1])


def test_an_answer_that_is_broken_off_stays_as_far_as_it_went(
    model: Any, processor: AudioFlamingo3Processor
) -> None:
    chat = Chat(model, processor)
    chat.add_audio(clip(1.0))
    answer = chat.ask("What is this?", max_new_tokens=200)
    pieces = [next(answer)]
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert chat.finish_reason is None
    assert "".join(chat.ask("and?", **OPTIONS)) == fresh_answer(model, processor, chat.messages[:-1])


def test_a_question_that_fails_leaves_the_conversation(
    model: Any, processor: AudioFlamingo3Processor
) -> None:
    chat = Chat(model, processor)
    chat.add_audio(clip(1.0))
    "".join(chat.ask("What is this?", **OPTIONS))
    before = list(chat.messages)
    chat.add_audio(clip(0.5))
    with pytest.raises(ArgumentError):
        "".join(chat.ask("and?", max_new_tokens=0))
    assert chat.messages == before
    "".join(chat.ask("and?", **OPTIONS))
    assert [part["type"] for part in chat.messages[-2]["content"]] == ["audio", "text"]
    assert chat.messages[-1]["content"] == fresh_answer(model, processor, chat.messages[:-1])


def test_clips_are_checked_when_they_are_added(
    model: Any, processor: AudioFlamingo3Processor, tmp_path: Path
) -> None:
    chat = Chat(model, processor)
    with pytest.raises(AudioError, match=r"nowhere\.wav"):
        chat.add_audio(str(tmp_path / "nowhere.wav"))
    with pytest.raises(AudioError, match="too short"):
        chat.add_audio(np.zeros(10, np.float32))
    assert chat.num_clips == 0


def test_the_transcript_names_clips(model: Any, processor: AudioFlamingo3Processor) -> None:
    chat = Chat(model, processor)
    assert chat.add_audio(clip(1.5)) == 24000 / SAMPLING_RATE
    "".join(chat.ask("What?", **OPTIONS))
    user, assistant = chat.transcript()
    assert user["content"][0] == {"type": "audio", "clip": 1, "duration_s": 1.5}
    assert assistant["role"] == "assistant"


def test_a_clip_that_was_encoded_is_not_encoded_again(model: Any, processor: AudioFlamingo3Processor) -> None:
    clips = ClipCache()
    answers = []
    for _ in range(2):
        chat = Chat(model, processor, clip_cache=clips)
        chat.add_audio(clip(31.0))
        answers.append("".join(chat.ask("What is this?", **OPTIONS)))
    assert (clips.num_misses, clips.num_hits) == (2, 2)
    assert answers[0] == answers[1]
