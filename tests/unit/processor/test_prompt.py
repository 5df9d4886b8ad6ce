"""Prompts one by one, and their way into a padded batch and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import ArgumentError, AudioError, AudioTooLongError, PromptError
from audioflamingo.processor import AudioFlamingo3Processor, Prompt, PromptText, collate, unbatch
from audioflamingo.processor.clips import Clip
from audioflamingo.processor.collate import unpad
from audioflamingo.processor.processor_options import TextOptions
from audioflamingo.processor.prompt import place_windows
from tests.support.tiny_tokenizer import AUDIO_TOKEN_ID, write_tiny_processor

RATE = 16000
PAIR: dict[str, Any] = {"tokenize": True, "return_dict": True}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("processor")))


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def user(text: str, *clips: np.ndarray) -> dict[str, Any]:
    audio = [{"type": "audio", "audio": waveform} for waveform in clips]
    return {"role": "user", "content": [*audio, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def conversations() -> list[list[dict[str, Any]]]:
    return [
        [user("the end"), answer("no")],
        [user("one", clip(0.5)), answer("yes")],
        [user("tail of 5 ms", clip(30.005, 1), clip(0.3, 2)), answer("two"), user("more", clip(0.2)), answer("ok")],
    ]  # fmt: skip


def same_prompts(first: list[Prompt], second: list[Prompt]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.token_ids == other.token_ids
        assert len(one.windows) == len(other.windows)
        assert np.array_equal(one.identity, other.identity)
        for window, found in zip(one.windows, other.windows, strict=True):
            assert (window.start, window.end, window.num_frames) == (found.start, found.end, found.num_frames)
            assert torch.equal(window.features, found.features)


# Making prompts


@pytest.mark.parametrize("labels", [False, True])
def test_collated_prompts_are_the_batch_of_the_chat_template(
    processor: AudioFlamingo3Processor, labels: bool
) -> None:
    prompts = [
        processor.prompt(messages, add_generation_prompt=not labels, labels=labels)
        for messages in conversations()
    ]
    for side in ("left", "right"):
        options = {"padding_side": side, "output_labels": "assistant" if labels else False}
        batch = processor.apply_chat_template(
            conversations(), add_generation_prompt=not labels, **options, **PAIR
        )
        made = collate(prompts, processor.tokenizer.pad_token_id, TextOptions(padding_side=side))
        assert set(made) == set(batch)
        assert all(torch.equal(made[name], batch[name]) for name in batch)
        assert {name: made[name].dtype for name in made} == {name: batch[name].dtype for name in batch}


def test_training_text_and_audio_give_the_labelled_prompt(processor: AudioFlamingo3Processor) -> None:
    """In two steps (text once, audio anew), with clips under their names, as in one."""
    clips = [[], [clip(0.5)], [clip(30.005, 1), clip(0.3, 2), clip(0.2)]]
    for messages, waveforms in zip(conversations(), clips, strict=True):
        whole = processor.prompt(messages, add_generation_prompt=False, labels=True)
        text = processor.training_text(messages)
        made = processor.add_audio(text, [Clip(waveform) for waveform in waveforms])
        same_prompts([whole], [made])
        assert made.labels == whole.labels
        counts = [sum(w.num_tokens for w in whole.windows)] if len(waveforms) == 1 else None
        if counts is not None:  # who has the audio in another form
            expanded = text.expand(counts)
            assert (expanded.token_ids, expanded.labels, expanded.windows) == (
                made.token_ids,
                made.labels,
                (),
            )
    with pytest.raises(AudioTooLongError, match="'a long one'"):
        processor.add_audio(
            processor.training_text(conversations()[1]), [Clip(np.zeros(601 * RATE), name="'a long one'")]
        )


@pytest.mark.parametrize("seconds", [0.1, 2.34, 30.0])
@pytest.mark.parametrize("instruction", [None, "Write it down: <sound><|im_end|>"])
def test_a_transcription_prompt_is_the_row_of_the_request(
    processor: AudioFlamingo3Processor, seconds: float, instruction: str | None
) -> None:
    waveform = clip(seconds)
    batch = processor.apply_transcription_request(waveform, instruction)
    prompt = processor.transcription_prompt(waveform, instruction)
    made = collate([prompt], processor.tokenizer.pad_token_id, TextOptions())
    assert set(made) == set(batch)
    assert all(torch.equal(made[name], batch[name]) for name in batch)


@pytest.mark.parametrize(
    ("waveform", "error", "expected"),
    [
        (np.zeros(16000), ArgumentError, "float64"),
        (np.zeros((1, 16000), np.float32), ArgumentError, r"\(1, 16000\)"),
        ([0.0], ArgumentError, "waveform must be"),
        (np.zeros(320, np.float32), AudioError, "waveform"),
        (np.zeros(480_001, np.float32), AudioError, "480000"),
        (np.full(16000, np.nan, np.float32), AudioError, "NaN"),
    ],
)
def test_transcription_prompts_take_one_window(
    processor: AudioFlamingo3Processor, waveform: Any, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        processor.transcription_prompt(waveform)


def test_wrong_conversations(processor: AudioFlamingo3Processor) -> None:
    with pytest.raises(PromptError, match="one conversation"):
        processor.prompt([[user("a")]])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="no assistant message"):
        processor.prompt([user("a")], add_generation_prompt=False, labels=True)
    with pytest.raises(PromptError, match="no assistant message"):
        processor.training_text([user("a")])
    with pytest.raises(ArgumentError, match="excludes"):
        processor.prompt([user("a")], continue_final_message=True)
    with pytest.raises(PromptError, match="1 <sound> for 0 clip"):
        processor.add_audio(processor.training_text(conversations()[1]), [])
    with pytest.raises(AudioTooLongError):
        processor.prompt([user("a", np.zeros(601 * RATE, np.float32))])


def test_a_prompt_can_end_inside_its_last_message(processor: AudioFlamingo3Processor) -> None:
    prompt = processor.prompt(
        [user("a"), answer("The ")], add_generation_prompt=False, continue_final_message=True
    )
    assert str(processor.decode(prompt.token_ids)).endswith("<|im_start|>assistant\nThe ")


def test_expanding_masks_labels_and_counts_clips() -> None:
    text = PromptText(np.array([5, 9, 6, 9]), 9, np.array([5, 9, 6, 9]))
    prompt = text.expand([2, 0])
    assert prompt.token_ids == [5, 9, 9, 6]
    assert prompt.labels == [5, IGNORED_LABEL, IGNORED_LABEL, 6]
    with pytest.raises(PromptError, match="2 <sound> for 1 clip"):
        text.expand([3])


# Identity


def test_identity_is_the_id_of_text_and_the_content_of_audio(processor: AudioFlamingo3Processor) -> None:
    first, again, other = (processor.prompt([user("one", clip(0.5, seed))]) for seed in (0, 0, 1))
    assert first.token_ids == other.token_ids
    assert np.array_equal(first.identity, again.identity)
    (window,) = first.windows
    is_audio = np.array(first.token_ids) == AUDIO_TOKEN_ID
    assert is_audio.nonzero()[0].tolist() == list(range(window.start, window.end))
    assert first.num_audio_tokens == window.num_tokens == is_audio.sum() == 12
    assert np.array_equal(first.identity[~is_audio], np.array(first.token_ids)[~is_audio])
    assert (first.identity[is_audio] < 0).all()
    assert (first.identity[is_audio] != other.identity[is_audio]).all()
    assert first.identity.dtype == np.int64
    assert len(first) == len(first.token_ids) == len(first.identity)


def test_what_the_encoder_does_not_see_changes_no_key(processor: AudioFlamingo3Processor) -> None:
    (window,) = processor.prompt([user("one", clip(0.5))]).windows
    noisy = window.features.clone()
    noisy[:, window.seen.shape[1] :] = 3.0
    changed = noisy.clone()
    changed[0, window.num_frames - 1] += 1.0
    (same,) = place_windows([AUDIO_TOKEN_ID] * 12, AUDIO_TOKEN_ID, [(noisy, window.num_frames)])
    (different,) = place_windows([AUDIO_TOKEN_ID] * 12, AUDIO_TOKEN_ID, [(changed, window.num_frames)])
    assert same.key == window.key != different.key
    assert window.seen.shape == (128, 51)


# Batches and back


def test_unbatch_undoes_collate(processor: AudioFlamingo3Processor) -> None:
    """Text only, one clip, several; a window without audio tokens; both sides; any order."""
    made = [processor.prompt(messages, add_generation_prompt=False) for messages in conversations()]
    for prompts in (made, made[::-1], made[:1]):
        for side in ("left", "right"):
            batch = collate(prompts, processor.tokenizer.pad_token_id, TextOptions(padding_side=side))
            same_prompts(prompts, unbatch(audio_token_id=AUDIO_TOKEN_ID, **batch))


def test_unpad_without_a_mask_and_with_a_longer_one() -> None:
    ids = torch.tensor([[0, 0, 5], [0, 6, 0]])
    assert unpad(ids) == [[0, 0, 5], [0, 6, 0]]
    assert unpad(ids, pad_token_id=0) == [[5], [6]]
    assert unpad(ids, torch.tensor([[1, 1, 0, 0, 1], [1, 1, 0, 1, 1]])) == [[5], [6, 0]]


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"input_ids": [[1]]}, ArgumentError, "input_ids must be a tensor of whole numbers"),
        ({"input_ids": torch.ones(2, 2)}, ArgumentError, r"torch.float32 \(2, 2\)"),
        ({"input_ids": torch.ones(2, 0).long()}, ArgumentError, "hold no token"),
        ({"attention_mask": torch.ones(2, 3)}, ArgumentError, "attention_mask must be"),
        ({"attention_mask": torch.tensor([[0] * 4, [1] * 4])}, ArgumentError, "row 0 .* all padding"),
        ({"input_features": torch.zeros(2, 4)}, ArgumentError, "input_features must be"),
        ({"input_features": torch.zeros(2, 4, 3).int()}, ArgumentError, "input_features must be"),
        ({"input_features_mask": torch.ones(1, 3)}, ArgumentError, "input_features_mask must be"),
        ({"input_features_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, ArgumentError, "ones first"),
        ({"input_features": None, "input_features_mask": None}, PromptError, "1 audio tokens, its audio gives 0"),
        ({"input_features": torch.zeros(3, 4, 3), "input_features_mask": None}, PromptError, "its audio gives 2"),
        ({"input_features": torch.zeros(2, 4, 7), "input_features_mask": None}, PromptError, "its audio gives 2"),
        ({"input_ids": torch.tensor([[9, 1, 9, 1], [1, 1, 1, 1]]), "input_features": torch.zeros(1, 4, 7),
          "input_features_mask": None}, PromptError, "must stand together"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(change: dict[str, Any], error: type[Exception], expected: str) -> None:
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[1, 9, 1, 1], [1, 1, 9, 1]]),
        "attention_mask": torch.ones(2, 4),
        "input_features": torch.zeros(2, 4, 3),
        "input_features_mask": torch.ones(2, 3),
    }
    assert [len(prompt) for prompt in unbatch(audio_token_id=9, **batch)] == [4, 4]
    with pytest.raises(error, match=expected):
        unbatch(audio_token_id=9, **{**batch, **change})


def test_labels_of_all_prompts_or_of_none(processor: AudioFlamingo3Processor) -> None:
    prompts = [Prompt([1], labels=[1]), Prompt([2])]
    for wrong in (prompts, []):
        with pytest.raises(ArgumentError, match="all or none"):
            collate(wrong, 0, TextOptions())


def test_prompts_of_a_saved_processor_are_the_same(
    processor: AudioFlamingo3Processor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    again = AudioFlamingo3Processor.from_pretrained(tmp_path)
    same_prompts([processor.prompt(conversations()[1])], [again.prompt(conversations()[1])])
