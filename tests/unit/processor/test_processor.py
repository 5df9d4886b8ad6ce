"""The processor: batches, clips, options, errors, files. Parity with transformers is in tests/parity."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.audio.features import AudioFlamingo3FeatureExtractor
from audioflamingo.config import IGNORED_LABEL
from audioflamingo.errors import (
    ArgumentError,
    AudioError,
    AudioFlamingoWarning,
    AudioTooLongError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    PromptError,
)
from audioflamingo.processor import AudioFlamingo3Processor, AutoProcessor
from audioflamingo.processor import clips as clips_module
from audioflamingo.processor.collate import BatchFeature
from audioflamingo.processor.conversation import strip_framing
from audioflamingo.processor.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import (
    AUDIO_TOKEN_ID,
    CONTROL_TOKENS,
    build_tiny_backend,
    write_json,
    write_tiny_processor,
)

RATE = 16000
PAIR = {"tokenize": True, "return_dict": True}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("processor")))


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def wav_bytes(waveform: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((waveform * 32767).astype("<i2").tobytes())
    return file.getvalue()


def user(*parts: Any) -> dict[str, Any]:
    """A user message: strings are texts, everything else is audio."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def chat(processor: AudioFlamingo3Processor, **options: Any) -> Any:
    return processor.apply_chat_template([user("a")], **options)


def set_class(path: Path, name: str) -> None:
    write_json(path, {"processor_class": name})


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def row(batch: BatchFeature, index: int) -> list[int]:
    """Ids of one row without its padding."""
    return batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()


# Batches and clips


def test_every_row_of_a_mixed_batch_equals_the_row_alone(processor: AudioFlamingo3Processor) -> None:
    """Text only, one clip, two clips in a turn, a clip in each of two turns: in both orders (P1)."""
    conversations = [
        [user("the end")],
        [user("one", clip(0.5))],
        [user("compare ", clip(0.3, 1), " and ", clip(31.0, 2))],
        [user("one", clip(0.4, 3)), answer("yes"), user("again", clip(0.2, 4))],
        [user("text ", "only"), answer("no"), user("sure?")],
    ]
    for order in (conversations, conversations[::-1]):
        batch = processor.apply_chat_template(order, add_generation_prompt=True, **PAIR)
        num_windows = 0
        for index, conversation in enumerate(order):
            alone = processor.apply_chat_template(conversation, add_generation_prompt=True, **PAIR)
            assert row(batch, index) == row(alone, 0)
            own = alone["input_features"] if "input_features" in alone else torch.zeros(0, 128, 3000)
            assert torch.equal(batch["input_features"][num_windows : num_windows + len(own)], own)
            num_windows += len(own)
        assert len(batch["input_features"]) == len(batch["input_features_mask"]) == num_windows == 6


def test_text_only_batches_have_no_audio_keys(processor: AudioFlamingo3Processor) -> None:
    batch = processor.apply_chat_template([[user("a")], [user("b c")]], output_labels=True, **PAIR)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_dtypes_and_shapes(processor: AudioFlamingo3Processor) -> None:
    batch = processor.apply_chat_template([user("a", clip(31))], output_labels=True, **PAIR)
    num_tokens = batch["input_ids"].shape[1]
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    assert shapes == {
        "input_ids": ((1, num_tokens), torch.int64),
        "attention_mask": ((1, num_tokens), torch.int64),
        "input_features": ((2, 128, 3000), torch.float32),
        "input_features_mask": ((2, 3000), torch.int32),
        "labels": ((1, num_tokens), torch.int64),
    }
    assert set(processor.model_input_names) == set(batch) - {"labels"}
    assert (batch["input_ids"] == AUDIO_TOKEN_ID).sum() == 750 + 25


def test_clips_expand_where_their_parts_stand(processor: AudioFlamingo3Processor) -> None:
    batch = processor.apply_chat_template([user("A", clip(0.1), "B", clip(0.2), "C")], **PAIR)
    text = processor.decode(batch["input_ids"])[0]
    assert text.endswith("user\nA<sound><sound>B<sound><sound><sound><sound><sound>C<|im_end|>\n")


def test_sources_of_every_kind_give_the_same_batch(
    processor: AudioFlamingo3Processor, tmp_path: Path
) -> None:
    import base64

    data = wav_bytes(clip(0.5))
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    samples = np.frombuffer(data[44:], "<i2")
    uri = "data:audio/wav;base64," + base64.b64encode(data).decode()
    sources = [
        {"path": str(path)},
        {"path": path},
        {"url": uri},
        {"audio": data},
        {"audio": io.BytesIO(data)},
        {"audio": samples},
        {"audio": samples.astype(np.float32) / 32768},
        {"audio": torch.tensor(samples.astype(np.float32) / 32768)},
    ]
    batches = [
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio", **source}]}], **PAIR)
        for source in sources
    ]
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batches[0])


def test_sampling_rates_of_arrays(processor: AudioFlamingo3Processor) -> None:
    """Stated for all arrays, or for one; a file keeps its own."""
    array, data = clip(1.0)[: RATE // 2], wav_bytes(clip(0.5))

    def num_tokens(**options: Any) -> int:
        part = {"type": "audio", "audio": array, **options.pop("part", {})}
        conversation = [{"role": "user", "content": [part, {"type": "audio", "audio": data}]}]
        batch = processor.apply_chat_template(conversation, **PAIR, **options)
        return int((batch["input_ids"] == AUDIO_TOKEN_ID).sum())

    assert num_tokens() == 12 + 12
    assert num_tokens(sampling_rate=8000) == 25 + 12
    assert num_tokens(audio_kwargs={"sampling_rate": 8000}) == 25 + 12
    assert num_tokens(part={"sampling_rate": 8000}, sampling_rate=4000) == 25 + 12
    part = {"type": "audio", "audio": data, "sampling_rate": 8000}
    conversation = [{"role": "user", "content": [part]}]
    with pytest.raises(ArgumentError, match="sampling_rate"):
        processor.apply_chat_template(conversation, **PAIR)


def test_one_source_is_loaded_once(
    processor: AudioFlamingo3Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(wav_bytes(clip(0.5)))
    loads = []
    load = clips_module.load_audio
    monkeypatch.setattr(
        clips_module, "load_audio", lambda source, **rest: loads.append(source) or load(source, **rest)
    )
    conversation = [user("a", {"path": 1})]
    part = {"type": "audio", "path": str(path)}
    conversation = [
        {"role": "user", "content": [part]},
        answer("a"),
        {"role": "user", "content": [part, dict(part)]},
    ]
    batch = processor.apply_chat_template([conversation, conversation], **PAIR)
    assert len(loads) == 1
    assert len(batch["input_features"]) == 6


@pytest.mark.parametrize("samples", [0, 1, 160, 320])
def test_clips_without_an_audio_token_are_refused(processor: AudioFlamingo3Processor, samples: int) -> None:
    with pytest.raises(AudioError):
        processor.apply_chat_template([user("a", np.zeros(samples, np.float32))], **PAIR)


def test_smallest_clip(processor: AudioFlamingo3Processor) -> None:
    batch = processor.apply_chat_template([user("a", np.zeros(321, np.float32))], **PAIR)
    assert (batch["input_ids"] == AUDIO_TOKEN_ID).sum() == 1


def test_long_clips(processor: AudioFlamingo3Processor) -> None:
    """Cut with a warning that states the loss, or refused; the limit here is one window."""
    short = copy.copy(processor)
    short.max_audio_len = 30
    conversation = [user("a", clip(31.5))]
    with pytest.warns(AudioFlamingoWarning, match=r"1\.50 s") as record:
        batch = short.apply_chat_template(conversation, **PAIR)
    assert len(record) == 1
    assert (batch["input_ids"] == AUDIO_TOKEN_ID).sum() == 750
    for options in ({"on_long": "error"}, {"audio_kwargs": {"on_long": "error"}}):
        with pytest.raises(AudioTooLongError):
            short.apply_chat_template(conversation, **PAIR, **options)


def test_ten_minutes_are_cheap_to_expand(
    processor: AudioFlamingo3Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows_seen = []

    def no_features(_: Any, windows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        windows_seen.append(len(windows))
        return torch.zeros(len(windows), 1), torch.ones(len(windows), 1)

    monkeypatch.setattr(AudioFlamingo3FeatureExtractor, "extract", no_features)
    with pytest.warns(AudioFlamingoWarning, match=r"61\.00 s"):
        batch = processor.apply_chat_template([user("a", np.zeros(661 * RATE, np.float32))], **PAIR)
    assert (batch["input_ids"] == AUDIO_TOKEN_ID).sum() == 15_000
    assert windows_seen == [20]


# Rendered prompts


def test_prompts_consume_clips_in_order(processor: AudioFlamingo3Processor) -> None:
    """More general than the reference's one clip a prompt."""
    batch = processor(["no clip", "two <sound><sound>", "one <sound>"], [clip(0.1), clip(0.2), clip(0.3)])
    assert [row(batch, i).count(AUDIO_TOKEN_ID) for i in range(3)] == [0, 2 + 5, 7]


def test_control_tokens_in_rendered_prompts_count(processor: AudioFlamingo3Processor) -> None:
    ids = row(processor("<|im_start|>user\na<|im_end|>"), 0)
    assert ids == processor.tokenizer.encode_prompt("<|im_start|>user\na<|im_end|>")
    assert ids[0] == processor.tokenizer.control_tokens["<|im_start|>"]


@pytest.mark.parametrize(
    ("text", "audio", "expected"),
    [
        ("<sound><sound>", [0.1], r"2 <sound> for 1 clip"),
        ("none", [0.1], r"0 <sound> for 1 clip"),
        (["<sound>", "x"], None, r"1 <sound> for 0 clip"),
    ],
)
def test_prompts_and_clips_that_do_not_match(
    processor: AudioFlamingo3Processor, text: Any, audio: list[float] | None, expected: str
) -> None:
    with pytest.raises(PromptError, match=expected):
        processor(text, audio if audio is None else [clip(seconds) for seconds in audio])


@pytest.mark.parametrize(
    ("text", "error"),
    [(None, ArgumentError), ([], ArgumentError), (3, ArgumentError), (["a", None], PromptError)],
)
def test_prompts_of_the_wrong_type(processor: AudioFlamingo3Processor, text: Any, error: type) -> None:
    with pytest.raises(error, match="text must be"):
        processor(text)


# Padding


def test_padding(processor: AudioFlamingo3Processor) -> None:
    pad = processor.tokenizer.pad_token_id
    texts, lengths = ["x", "x q z"], [1, 5]
    for options, total, side in (
        ({}, 5, "left"),
        ({"padding": "longest", "padding_side": "right"}, 5, "right"),
        ({"pad_to_multiple_of": 8}, 8, "left"),
        ({"padding": "max_length", "max_length": 9}, 9, "left"),
        ({"padding": "max_length", "max_length": 9, "pad_to_multiple_of": 4}, 12, "left"),
        ({"max_length": 5}, 5, "left"),
    ):
        for batch in (processor(texts, **options), processor(texts, text_kwargs=options)):
            assert batch["input_ids"].shape == (2, total)
            for index, length in enumerate(lengths):
                mask = [0] * (total - length) + [1] * length
                mask = mask if side == "left" else mask[::-1]
                assert batch["attention_mask"][index].tolist() == mask
                assert set(batch["input_ids"][index][batch["attention_mask"][index] == 0].tolist()) <= {pad}
                assert processor.decode(row(batch, index)) == texts[index]


def test_prompts_are_never_cut(processor: AudioFlamingo3Processor) -> None:
    for options in (
        {"max_length": 4},
        {"max_length": 4, "padding": "max_length"},
        {"max_length": 4, "padding": False},
    ):
        with pytest.raises(ContextLengthError, match="5 tokens, max_length allows 4"):
            processor("x q z", **options)
    with pytest.raises(ArgumentError, match="never cut"):
        processor("x q z", max_length=4, truncation=True)


def test_without_padding_rows_must_match(processor: AudioFlamingo3Processor) -> None:
    assert processor(["x q", "q x"], padding=False)["input_ids"].shape == (2, 3)
    with pytest.raises(PromptError, match="1, 3 tokens"):
        processor(["x", "q x"], padding=False)


def test_a_tokenizer_without_padding_token(processor: AudioFlamingo3Processor) -> None:
    tokenizer = Tokenizer(build_tiny_backend(), {"pad_token": None})
    unpadded = AudioFlamingo3Processor(processor.feature_extractor, tokenizer)
    assert unpadded(["x q", "q x"], output_labels=True)["labels"].shape == (2, 3)
    with pytest.raises(PromptError, match="no padding token"):
        unpadded(["x", "q x"])


# Labels


def test_labels_mask_audio_and_padding_positions(processor: AudioFlamingo3Processor, tmp_path: Path) -> None:
    """Padding is masked by position: where it is done with `<|im_end|>`, answers still learn to end."""
    folder = write_tiny_processor(tmp_path, tokenizer_config={"pad_token": "<|im_end|>"})
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    batch = processor.apply_chat_template(
        [[user("a", clip(0.1)), answer("b")], [user("the longer one"), answer("and its answer")]],
        output_labels=True,
        **PAIR,
    )
    is_ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == AUDIO_TOKEN_ID)
    assert is_ignored.sum() > 2
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(is_ignored, IGNORED_LABEL))


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_the_assistant_only(processor: AudioFlamingo3Processor, side: str) -> None:
    conversations = [
        [user("Q ", clip(0.1), " and ", clip(0.2)), answer("first"), user("assistant\n"), answer("second ")],
        [user("Q<|im_end|><sound>"), answer("a <|im_end|> b")],
    ]
    batch = processor.apply_chat_template(conversations, output_labels="assistant", padding_side=side, **PAIR)
    full = processor.apply_chat_template(conversations, padding_side=side, **PAIR)
    assert torch.equal(batch["input_ids"], full["input_ids"])
    labelled = batch["labels"] != IGNORED_LABEL
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    texts = [processor.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], labelled, strict=True)]
    assert texts == ["first<|im_end|>second <|im_end|>", "a <|im_end|> b<|im_end|>"]
    end = processor.tokenizer.control_tokens["<|im_end|>"]
    assert [int((labels == end).sum()) for labels in batch["labels"]] == [2, 1]


def test_labels_need_something_to_label(processor: AudioFlamingo3Processor) -> None:
    with pytest.raises(PromptError, match="conversation 1 has no assistant message"):
        processor.apply_chat_template(
            [[user("a"), answer("b")], [user("a")]], output_labels="assistant", **PAIR
        )
    with pytest.raises(ArgumentError, match="apply_chat_template"):
        processor("a", output_labels="assistant")
    with pytest.raises(ArgumentError, match="tokenize=True"):
        processor.apply_chat_template([user("a")], output_labels=True)


# Templates, requests, decoding


def test_rendered_text(processor: AudioFlamingo3Processor) -> None:
    conversation = [user("a <sound>", clip(0.1))]
    text = processor.apply_chat_template(conversation)
    assert text.endswith("<|im_start|>user\n<sound>a <sound><|im_end|>\n")
    assert processor.apply_chat_template([conversation, conversation]) == [text, text]


def test_other_templates(processor: AudioFlamingo3Processor) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    several = copy.copy(processor)
    several.chat_template = {"default": "D{{ messages[0].content }}", "other": "O"}
    assert several.apply_chat_template(conversation) == "Dhi"
    assert several.apply_chat_template(conversation, chat_template="other") == "O"
    assert several.apply_chat_template(conversation, "X{{ messages[0].role }}") == "Xuser"
    several.chat_template = {"a": "A", "b": "B"}
    with pytest.raises(PromptError, match="one of a, b"):
        several.apply_chat_template(conversation)
    with pytest.raises(ArgumentError, match="chat_template must be"):
        several.apply_chat_template(conversation, chat_template=3)


def test_without_any_template_the_published_one_is_used(tmp_path: Path) -> None:
    processor = AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path, chat_template=None))
    text = processor.apply_chat_template([user("a", clip(0.1))], add_generation_prompt=True)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == system + "<|im_start|>user\n<sound>a<|im_end|>\n<|im_start|>assistant\n"


def test_continuing_excludes_a_new_turn(processor: AudioFlamingo3Processor) -> None:
    conversation = [user("a"), answer("The ")]
    batch = processor.apply_chat_template(conversation, continue_final_message=True, **PAIR)
    assert processor.decode(batch["input_ids"])[0].endswith("<|im_start|>assistant\nThe ")
    for other in ({"add_generation_prompt": True}, {"output_labels": "assistant"}):
        with pytest.raises(ArgumentError, match="excludes"):
            processor.apply_chat_template(conversation, continue_final_message=True, **PAIR, **other)


def test_transcription_requests(processor: AudioFlamingo3Processor, tmp_path: Path) -> None:
    prompts = processor.apply_transcription_request("nowhere.wav", tokenize=False)
    assert prompts == [processor.apply_chat_template(
        [user("Transcribe the input speech.", clip(0.1))], add_generation_prompt=True
    )]  # fmt: skip
    prompts = processor.apply_transcription_request(["a", "b"], prompt=["Now <sound>.", None], tokenize=False)
    assert ["Now <sound>." in prompt for prompt in prompts] == [True, False]
    batch = processor.apply_transcription_request([clip(0.1), wav_bytes(clip(0.2))], padding_side="right")
    assert [row(batch, i).count(AUDIO_TOKEN_ID) for i in range(2)] == [2, 5]
    assert batch["attention_mask"][:, 0].all()
    for audio, prompt in (([], None), (None, None), (["a", "b"], ["x"]), ("a", ["x", "y"])):
        with pytest.raises(PromptError):
            processor.apply_transcription_request(audio, prompt, tokenize=False)
    with pytest.raises(ArgumentError, match="prompt must be"):
        processor.apply_transcription_request("a", prompt=3, tokenize=False)
    with pytest.raises(ArgumentError, match="add_generation_prompt"):
        processor.apply_transcription_request("a", add_generation_prompt=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('The spoken content of the audio is "Hi. There.".', "Hi. There."),
        ("The transcription of the audio is 'Hi'", "Hi"),
        ("The content of the input audio is plain words.", "plain words"),
        ('"Only quotes."', "Only quotes."),
        ("'Only quotes'.", "Only quotes"),
        ("Nothing around this.", "Nothing around this."),
        ("  Spaces only.  ", "Spaces only."),
        ('"Unbalanced.', '"Unbalanced.'),
        ("\"Mixed'.", "\"Mixed'."),
        ('He said "no".', 'He said "no".'),
        ('"', '"'),
        (".", "."),
        ("The spoken content of the audio is", ""),
        ("", ""),
    ],
)
def test_strip_framing(text: str, expected: str) -> None:
    """A full stop goes only with a known opening or with quotes (P18)."""
    assert strip_framing(text) == expected


def test_decode(processor: AudioFlamingo3Processor) -> None:
    framed = 'The spoken content of the audio is "the end".<|im_end|>'
    ids = processor.tokenizer.encode_prompt(framed)
    assert processor.decode(ids) == framed
    assert processor.decode(ids, skip_special_tokens=True, strip_prefix=True) == "the end"
    assert processor.decode(torch.tensor([ids]), skip_special_tokens=True, strip_prefix=True) == ["the end"]
    assert processor.batch_decode([ids, ids], skip_special_tokens=True, strip_prefix=True) == ["the end"] * 2
    with pytest.raises(ArgumentError, match="did you mean 'strip_prefix'"):
        processor.decode(ids, strip_prefixes=True)


# Keywords


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda p: p("a", audios=[]), "did you mean 'audio'"),
        (lambda p: p("a", images=[]), "processor.. got unknown argument"),
        (lambda p: p("a", text_kwargs={"padding_sides": "left"}), "text_kwargs.*did you mean 'padding_side'"),
        (lambda p: p("a", audio_kwargs={"padding": True}), "audio_kwargs got unknown argument"),
        (lambda p: p("a", audio_kwargs={"sample_rate": 1}), "did you mean 'sampling_rate'"),
        (lambda p: p("a", text_kwargs=[1]), "text_kwargs must be a dict"),
        (lambda p: p("a", padding=True, text_kwargs={"padding": True}), "given twice"),
        (lambda p: p("a", padding="left"), "padding='left'"),
        (lambda p: p("a", padding_side="middle"), "padding_side='middle'"),
        (lambda p: p("a", max_length=0), "max_length=0"),
        (lambda p: p("a", pad_to_multiple_of=True), "pad_to_multiple_of=True"),
        (lambda p: p("a", padding="max_length"), "needs max_length"),
        (lambda p: p("a", return_tensors="np"), "return_tensors='np'"),
        (lambda p: p("a", on_long="cut"), "on_long='cut'"),
        (lambda p: p("a", output_labels=1.5), "output_labels=1.5"),
        (lambda p: chat(p, add_generation_prompts=True), "did you mean 'add_generation_prompt'"),
        (lambda p: chat(p, tools=[]), "unknown argument"),
        (lambda p: chat(p, output_labels="user"), "output_labels='user'"),
        (lambda p: p.apply_transcription_request("a", promt="b"), "'promt'"),
        (lambda p: AutoProcessor.from_pretrained("no", max_audio_length=3), "did you mean 'max_audio_len'"),
        (lambda p: AudioFlamingo3Processor(p.tokenizer, p.feature_extractor), "feature_extractor must be"),
    ],
)
def test_unknown_keywords_and_wrong_values(
    processor: AudioFlamingo3Processor, call: Any, expected: str
) -> None:
    """Nothing that was asked for is silently left out (P14)."""
    with pytest.raises(ArgumentError, match=expected):
        call(processor)


# Files


def test_save_and_load(processor: AudioFlamingo3Processor, tmp_path: Path) -> None:
    changed = copy.copy(processor)
    changed.default_transcription_prompt, changed.max_audio_len = "Write it down.", 300
    changed.chat_template = "{{ messages[0].content[0].text }}"
    changed.save_pretrained(tmp_path / "first")
    loaded = AutoProcessor.from_pretrained(tmp_path / "first")
    assert isinstance(loaded, AudioFlamingo3Processor)
    assert (loaded.default_transcription_prompt, loaded.max_audio_len) == ("Write it down.", 300)
    assert loaded.chat_template == changed.chat_template
    assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    loaded.save_pretrained(str(tmp_path / "second"))
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()
    assert AutoProcessor.from_pretrained(tmp_path / "first", max_audio_len=60).max_audio_len == 60


def test_unknown_settings_survive(tmp_path: Path) -> None:
    folder = write_tiny_processor(tmp_path / "first")
    config = json.loads((folder / "processor_config.json").read_text())
    config["made_by"] = {"version": 3}
    config["feature_extractor"]["made_by"] = "us"
    write_json(folder / "processor_config.json", config)
    AudioFlamingo3Processor.from_pretrained(folder).save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "processor_config.json").read_text()) == config


def test_older_feature_extractor_file(tmp_path: Path) -> None:
    folder = write_tiny_processor(tmp_path, feature_size=80)
    config = json.loads((folder / "processor_config.json").read_text())
    write_json(folder / "preprocessor_config.json", config.pop("feature_extractor"))
    write_json(folder / "processor_config.json", config)
    assert AudioFlamingo3Processor.from_pretrained(folder).feature_extractor.feature_size == 80
    (folder / "processor_config.json").unlink()
    assert AudioFlamingo3Processor.from_pretrained(folder).feature_extractor.feature_size == 80


def test_original_layout(tmp_path: Path) -> None:
    """NVIDIA's folders have another, text-only template and no settings of the front end."""
    write_tiny_processor(
        tmp_path / "llm", chat_template="{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    )
    (tmp_path / "llm" / "processor_config.json").unlink()
    (tmp_path / "sound_tower").mkdir()
    processor = AudioFlamingo3Processor.from_pretrained(tmp_path)
    assert processor.feature_extractor.feature_size == 128
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    rendered = processor.apply_chat_template([user("Q", clip(0.1))])
    assert rendered == system + "<|im_start|>user\n<sound>Q<|im_end|>\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "processor_config.json").unlink(), "no processor_config.json"),
        (lambda f: (f / "processor_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda f: set_class(f / "processor_config.json", "MusicFlamingoProcessor"), "MusicFlamingo"),
        (lambda f: set_class(f / "preprocessor_config.json", "WhisperProcessor"), "WhisperProcessor"),
        (lambda f: shutil.rmtree(f), "there is no folder"),
    ],
)
def test_damaged_folders(tmp_path: Path, change: Any, expected: str) -> None:
    folder = write_tiny_processor(tmp_path / "folder")
    change(folder)
    with pytest.raises(CheckpointError, match=expected):
        AudioFlamingo3Processor.from_pretrained(folder)


def test_arguments_that_cannot_work(processor: AudioFlamingo3Processor) -> None:
    with pytest.raises(CheckpointError, match="<audio>"):
        AudioFlamingo3Processor(processor.feature_extractor, processor.tokenizer, audio_token="<audio>")
    with pytest.raises(ConfigError, match="max_audio_len=20"):
        AudioFlamingo3Processor(processor.feature_extractor, processor.tokenizer, max_audio_len=20)


def test_attributes(processor: AudioFlamingo3Processor) -> None:
    assert processor.audio_token == "<sound>"
    assert processor.audio_token_id == AUDIO_TOKEN_ID
    assert isinstance(processor.tokenizer, Tokenizer)
    assert isinstance(processor.feature_extractor, AudioFlamingo3FeatureExtractor)
    assert set(processor.tokenizer.control_tokens) == set(CONTROL_TOKENS)


# The batch itself


def test_batch_feature_moves_features_only() -> None:
    batch = BatchFeature(
        input_ids=torch.ones(1, 2, dtype=torch.int64), input_features=torch.ones(1), note="n"
    )
    for moved in (
        batch.to(torch.float16),
        batch.to("cpu", torch.float16),
        batch.to(torch.device("cpu"), dtype=torch.float16),
        batch.to(device="cpu", dtype=torch.float16, non_blocking=True),
    ):
        assert isinstance(moved, BatchFeature)
        assert (moved.input_ids.dtype, moved.input_features.dtype) == (torch.int64, torch.float16)
        assert moved.note == "n"
    assert batch.input_features.dtype == torch.float32
    assert batch.to("meta").input_ids.device.type == "meta"


@pytest.mark.parametrize(
    "arguments", [((1.5,), {}), (("cpu", "cpu"), {}), ((torch.int8,), {}), ((), {"dtypes": torch.half})]
)
def test_batch_feature_refuses_other_arguments(arguments: Any) -> None:
    positional, keywords = arguments
    with pytest.raises(ArgumentError):
        BatchFeature(x=torch.ones(1)).to(*positional, **keywords)


def test_batch_feature_is_a_dict_with_attributes() -> None:
    batch = BatchFeature(a=1)
    batch.b = 2
    assert dict(**batch) == {"a": 1, "b": 2}
    assert copy.deepcopy(batch) == pickle.loads(pickle.dumps(batch)) == batch
    assert not hasattr(batch, "c")
    with pytest.raises(AttributeError, match="no 'c' here, only a, b"):
        _ = batch.c
