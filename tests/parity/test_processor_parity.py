"""The processor beside transformers' `AudioFlamingo3Processor`, on the same folder and the same audio."""

from __future__ import annotations

import copy
import io
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AudioFlamingo3Processor as ReferenceProcessor

from audioflamingo.errors import AudioFlamingoWarning
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.qwen_tokenizer_files import write_qwen_processor
from tests.support.tiny_tokenizer import CONTROL_TOKENS, TINY_VOCABULARY_SIZE, write_tiny_processor

RATE = 16000
TEXTS = {
    "plain": "What is the capital of France?",
    "emoji": "Which one: 🙂, 👩‍👩‍👧 or 🇫🇷? ☃️",
    "chinese": "请转录这段音频。语速较快,3 个人。",
    "combining": "Cafe\u0301 nai\u0308ve A\u030a \u1100\u1161\u11a8 \u2126",
    "spaces": "   two  spaces\tand a tab   ",
    "line feeds": "\n\nfirst\n \nlast\n",
    "newline first": "\nline",
    "empty": "",
    "code": "def f(x):\r\n\treturn {'a': [x]} # it's 100% <b>bold</b> <|nothing|> < sound>",
    "right to left": "ما هذا الصوت؟",
    "long number": "1234567890 3.14159",
}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A repeatable clip; its number of samples is what matters here."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def write_wav(path: Path, seconds: float, seed: int = 0) -> str:
    """Writes 16-bit mono 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((noise(seconds, seed) * 32767).astype("<i2").tobytes())
    return str(path)


def user(*parts: Any) -> dict[str, Any]:
    """A user message of texts (strings) and clips (anything in a tuple)."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "path": part[0]}
        for part in parts
    ]
    return {"role": "user", "content": content}


def said(text: str, role: str = "assistant") -> dict[str, Any]:
    """A message of one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("processors")
    return {"tiny": write_tiny_processor(root / "tiny"), "qwen": write_qwen_processor(root / "qwen")}


@pytest.fixture(scope="session")
def processors(folders: dict[str, Path]) -> dict[str, tuple[AudioFlamingo3Processor, ReferenceProcessor]]:
    return {
        name: (AudioFlamingo3Processor.from_pretrained(folder), ReferenceProcessor.from_pretrained(folder))
        for name, folder in folders.items()
    }


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("clips")
    lengths = {"short": 0.5, "ten": 10.0, "long": 31.0}
    return {name: write_wav(root / f"{name}.wav", s, i) for i, (name, s) in enumerate(lengths.items())}


@pytest.fixture(params=["tiny", "qwen"])
def pair(
    request: pytest.FixtureRequest, processors: Any
) -> tuple[AudioFlamingo3Processor, ReferenceProcessor]:
    return processors[request.param]


def assert_equal(ours: Any, reference: Any) -> None:
    """All tensors equal in shape, dtype and value; features to float32 rounding."""
    assert set(ours) == set(reference)
    for name in reference:
        assert ours[name].shape == reference[name].shape, name
        assert ours[name].dtype == reference[name].dtype, name
        if name == "input_features":
            torch.testing.assert_close(ours[name], reference[name], rtol=0, atol=2e-4)
        else:
            assert torch.equal(ours[name], reference[name]), name


def compare(pair: Any, conversation: Any, **options: Any) -> Any:
    """Runs both processors, which must agree, and returns our batch."""
    ours, reference = pair
    arguments = {"tokenize": True, "return_dict": True, "add_generation_prompt": True} | options
    before = copy.deepcopy(conversation)
    batch = ours.apply_chat_template(conversation, **arguments)
    assert conversation == before, "the caller's conversation was changed"
    assert_equal(batch, reference.apply_chat_template(conversation, **arguments))
    return batch


def all_added_tokens(**extra: Any) -> dict[str, dict[str, Any]]:
    """The tiny tokenizer's list of control tokens in the configuration's form, with one more at the end."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    tokens = [{"content": token, "special": special} for token, special in CONTROL_TOKENS.items()]
    first = TINY_VOCABULARY_SIZE - len(CONTROL_TOKENS)
    return {str(first + i): flags | token for i, token in enumerate([*tokens, {"special": False} | extra])}


def seed_conversations(clips: dict[str, str]) -> dict[str, Any]:
    """The conversations of the documentation page."""
    instruction = user("Transcribe the input speech.", (clips["ten"],))
    tone = user(
        "Instruction: How does the tone of female speech change throughout the audio? Choose the correct "
        "option among the options below: (A) Sad to happy (B) Happy to sad (C) Neutral to happy (D) Happy to "
        "neutral.",
        (clips["long"],),
    )
    music = user(
        "This track feels really peaceful and introspective. What elements make it feel so calming and "
        "meditative?",
        (clips["long"],),
    )
    return {
        "audio and text": [instruction],
        "multi-turn": [tone, said("(A) Sad to happy"), user("Why do you think so?")],
        "text only": [user("What is the capital of France?")],
        "audio only": [user((clips["ten"],))],
        "batch": [[instruction], [music]],
        "training": [
            [instruction, said("The transcription of the audio is 'summer follows spring'.")],
            [music, said("The transcription of the audio is 'some transcription of the audio'.")],
        ],
    }


@pytest.mark.parametrize(
    "name", ["audio and text", "multi-turn", "text only", "audio only", "batch", "training"]
)
def test_conversations_of_the_documentation(pair: Any, clips: dict[str, str], name: str) -> None:
    conversation = seed_conversations(clips)[name]
    compare(pair, conversation)
    compare(pair, conversation, output_labels=True)
    ours, reference = pair
    rendered = ours.apply_chat_template(conversation, add_generation_prompt=True)
    assert rendered == reference.apply_chat_template(conversation, add_generation_prompt=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(pair: Any, clips: dict[str, str], side: str) -> None:
    batch = [[user("a", (clips["short"],))], [user("a longer question, with more tokens", (clips["ten"],))]]
    compare(pair, batch, padding_side=side)
    compare(pair, batch, text_kwargs={"padding_side": side}, output_labels=True)
    compare(pair, batch, text_kwargs={"pad_to_multiple_of": 64})
    compare(pair, batch, text_kwargs={"padding": "max_length", "max_length": 512, "padding_side": side})


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts(pair: Any, clips: dict[str, str], text: str) -> None:
    """Every place that a text can stand in; the clip is short, since only the prompt is at stake."""
    compare(pair, [user(text)])
    compare(pair, [{"role": "user", "content": text}])
    compare(pair, [user(text, (clips["short"],))])
    compare(pair, [user((clips["short"],), text, text)])
    compare(pair, [said(text, "system"), user(text), said(text), user(text)], add_generation_prompt=False)
    compare(pair, [{"role": "system", "content": text}, {"role": "user", "content": text}])
    compare(pair, [user(text), said(text)], add_generation_prompt=False, continue_final_message=True)


LETTERS = st.sampled_from(
    ["a", " ", "  ", "\n", "\t", "\r\n", ".", "'s", "7", "<", ">", "|", "e\u0301", "\u0338", "\u00a0"]
)
ANY_TEXT = st.lists(LETTERS | st.text(max_size=3), max_size=12).map("".join)


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3), has_system=st.booleans())
@settings(deadline=None, max_examples=100)
def test_any_text(processors: Any, texts: list[str], has_system: bool) -> None:
    """Text without control tokens is tokenised as by the reference, over borders of parts and template."""
    assume(not any(token in "".join(texts) for token in CONTROL_TOKENS))
    conversation = [said(texts[0], "system")] * has_system + [user(*texts), said(texts[0]), user(texts[-1])]
    for ours, reference in processors.values():
        arguments: dict[str, Any] = {"tokenize": True, "add_generation_prompt": True}
        expected = reference.apply_chat_template(conversation, **arguments)
        assert torch.equal(ours.apply_chat_template(conversation, **arguments), expected)
        ids = expected[0].tolist()
        assert ours.decode(ids) == reference.decode(ids)


def test_parts_in_any_order_and_empty_content(pair: Any, clips: dict[str, str]) -> None:
    compare(pair, [user("first, ", "second, ", (clips["short"],), "third")])
    compare(pair, [user((clips["short"],), "first")])
    compare(pair, [user()])


@pytest.mark.parametrize("seconds", [0.03, 0.05, 0.5, 7.3, 29.99, 30.0, 30.005, 30.01, 30.03, 59.99, 65.2])
def test_lengths(processors: Any, seconds: float) -> None:
    """Windows, masks and token counts around the borders of frames and windows."""
    ours, reference = processors["tiny"]
    prompt = "<|im_start|>user\n<sound>go<|im_end|>\n"
    audio = noise(seconds)
    assert_equal(ours(text=prompt, audio=audio), reference(text=prompt, audio=audio))


def test_every_short_length(processors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample counts around the first frames and around 30 s."""
    ours, reference = without_features(processors["tiny"], monkeypatch)
    lengths = [
        321,
        479,
        480,
        481,
        640,
        641,
        799,
        800,
        801,
        479_999,
        480_000,
        480_001,
        480_160,
        480_161,
        480_480,
    ]
    audio = [np.zeros(length, np.float32) for length in lengths]
    texts = ["<sound>"] * len(audio)
    assert_equal(ours(text=texts, audio=audio), reference(text=texts, audio=audio))


@pytest.mark.parametrize(("seconds", "num_tokens"), [(599.9, 14_997), (661.0, 15_000)])
def test_ten_minutes(
    processors: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, num_tokens: int
) -> None:
    """20 windows at most; what is cut off is said."""
    ours, reference = without_features(processors["tiny"], monkeypatch)
    audio = np.zeros(round(seconds * RATE), dtype=np.float32)
    expected = reference(text="<sound>Why?", audio=audio)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = ours(text="<sound>Why?", audio=audio)
    assert_equal(got, expected)
    assert (got["input_ids"] == ours.audio_token_id).sum() == num_tokens
    messages = [str(warning.message) for warning in caught if warning.category is AudioFlamingoWarning]
    assert len(messages) == (seconds > 600)
    assert all("61.00 s" in message for message in messages)


def without_features(pair: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both processors with one silent mel band for features: for tests of windows, masks and counts."""
    ours, reference = pair

    def only_mask(windows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        frames = torch.tensor([-(-len(window) // 160) for window in windows])
        return torch.zeros(len(windows), 1, 3000), (torch.arange(3000) < frames[:, None]).int()

    class ReferenceExtractor:
        def __getattr__(self, name: str) -> Any:
            return getattr(feature_extractor, name)

        def __call__(self, windows: list[np.ndarray], **_: Any) -> dict[str, torch.Tensor]:
            features, mask = only_mask(windows)
            return {"input_features": features, "attention_mask": mask}

    feature_extractor = reference.feature_extractor
    monkeypatch.setattr(reference, "feature_extractor", ReferenceExtractor())
    monkeypatch.setattr(type(ours.feature_extractor), "extract", lambda _, windows: only_mask(windows))
    return ours, reference


def test_call_with_prompts_and_clips(pair: Any) -> None:
    ours, reference = pair
    texts = ["<|im_start|>user\n<sound>What?<|im_end|>\n", "no turn <sound> at all <tool_call>"]
    audio = [noise(1.0), noise(2.5, 1)]
    assert_equal(ours(text=texts, audio=audio), reference(text=texts, audio=audio))
    assert_equal(
        ours(text=texts, audio=audio, output_labels=True),
        reference(text=texts, audio=audio, output_labels=True),
    )
    assert_equal(ours(text="only text"), reference(text="only text"))
    assert_equal(
        ours(texts, audio, text_kwargs={"padding_side": "right"}),
        reference(texts, audio, text_kwargs={"padding_side": "right"}),
    )


def test_transcription_request(pair: Any, clips: dict[str, str]) -> None:
    ours, reference = pair
    for audio in (
        clips["short"],
        [clips["short"], clips["ten"]],
        noise(1.0),
        [noise(1.0), torch.ones(999) / 9],
    ):
        assert_equal(ours.apply_transcription_request(audio), reference.apply_transcription_request(audio))
    audio = [clips["short"], clips["ten"]]
    for prompt in ("Do it.", ["Do it.", None]):
        expected = reference.apply_transcription_request(audio=audio, prompt=prompt)
        assert_equal(ours.apply_transcription_request(audio=audio, prompt=prompt), expected)
        expected = reference.apply_transcription_request(audio=audio, prompt=prompt, tokenize=False)
        assert ours.apply_transcription_request(audio=audio, prompt=prompt, tokenize=False) == expected


def test_without_return_dict(pair: Any, clips: dict[str, str]) -> None:
    ours, reference = pair
    conversation = [user("Why?", (clips["short"],))]
    expected = reference.apply_chat_template(conversation, tokenize=True)
    assert torch.equal(ours.apply_chat_template(conversation, tokenize=True), expected)


def test_decode(pair: Any) -> None:
    ours, reference = pair
    texts = [*TEXTS.values(), "<|im_start|>assistant\nHi 你<tool_call>x<|im_end|>\n<|endoftext|>"]
    for text in texts:
        ids = reference.tokenizer(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )
            if ids:
                row = torch.tensor(ids)
                assert ours.decode(row, skip_special_tokens=skip) == reference.decode(
                    row, skip_special_tokens=skip
                )
    cut = ours.tokenizer.encode_plain("🙂")[:-1]
    assert ours.decode(cut) == reference.decode(cut)
    batch = reference.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    assert ours.decode(batch, True) == reference.decode(batch, skip_special_tokens=True)
    assert ours.batch_decode(batch) == reference.batch_decode(batch)


@pytest.mark.parametrize(
    ("answer", "is_framed"),
    [
        ('The spoken content of the audio is "Hello there.".', True),
        ("The transcription of the audio is 'it's fine'.", True),
        ("The content of the input audio is hello.", True),
        ('  "quoted." ', True),
        ("'quoted'.", True),
        ('The spoken content of the audio is "unfinished', True),
        ("no full stop", True),
        ("", True),
        ("A transcript. With two sentences.", False),
    ],
)
def test_strip_prefix(processors: Any, answer: str, is_framed: bool) -> None:
    """Equal to the reference, but for the full stop of a text without frame, which the reference loses."""
    ours, reference = processors["tiny"]
    ids = [ours.tokenizer.encode_plain(answer)]
    expected = reference.decode(ids, skip_special_tokens=True, strip_prefix=True)
    if not is_framed:
        assert expected == [answer.removesuffix(".")]
        expected = [answer]
    assert ours.decode(ids, skip_special_tokens=True, strip_prefix=True) == expected


def test_saved_folders_load_on_the_other_side(processors: Any, clips: dict[str, str], tmp_path: Path) -> None:
    ours, reference = processors["tiny"]
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "reference")
    other_reference = ReferenceProcessor.from_pretrained(tmp_path / "ours")
    other_ours = AudioFlamingo3Processor.from_pretrained(tmp_path / "reference")
    conversation = [said("Be brief. 你好", "system"), user("Why?", (clips["short"],))]
    compare((other_ours, reference), conversation)
    compare((ours, other_reference), conversation, output_labels=True)
    assert other_reference.to_dict() == reference.to_dict()
    assert other_reference.tokenizer.get_vocab() == reference.tokenizer.get_vocab()
    assert other_reference.tokenizer.special_tokens_map == reference.tokenizer.special_tokens_map


@pytest.mark.parametrize(
    "tokenizer_config",
    [
        {"pad_token": "[PAD]"},  # absent from tokenizer.json: both add it
        {"pad_token": "<tool_call>"},  # becomes a special token
        {"extra_special_tokens": ["<tool_call>", "<|new|>"]},
        {"additional_special_tokens": ["</tool_call>"]},
        {"audio_token": "<sound>", "bos_token": "<|endoftext|>"},
        {"pad_token": {"__type": "AddedToken", "content": "<|im_start|>", "special": True}},
        {"added_tokens_decoder": all_added_tokens(content="<extra>", lstrip=True, rstrip=True, special=True)},
        {"added_tokens_decoder": all_added_tokens(content="<e\u0301xtra>", normalized=True)},
        {"added_tokens_decoder": all_added_tokens(content="<\u00e9xtra>", normalized=True, single_word=True)},
    ],
)
def test_tokenizer_configurations(tmp_path: Path, tokenizer_config: dict[str, Any]) -> None:
    """Named and added tokens get the ids and the special treatment that transformers gives them."""
    folder = write_tiny_processor(tmp_path, tokenizer_config=tokenizer_config)
    ours = AudioFlamingo3Processor.from_pretrained(folder)
    reference = ReferenceProcessor.from_pretrained(folder)
    tokenizer = reference.tokenizer
    assert (ours.tokenizer.pad_token_id, ours.tokenizer.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    text = (
        "a <extra>  b<|im_end|> <\u00e9xtra> x<\u00e9xtra>y <e\u0301xtra><tool_call></tool_call>[PAD] <|new|>"
    )
    ids = tokenizer(text)["input_ids"]
    assert ours.tokenizer.encode_prompt(text) == ids
    assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    batch = ["<sound>a", "<sound>a longer one"]
    audio = [noise(0.5)] * 2
    assert_equal(ours(batch, audio), reference(batch, audio))


@pytest.mark.parametrize(
    "where", ["chat_template.json", "tokenizer_config.json", "list in tokenizer_config.json"]
)
def test_older_places_of_the_chat_template(tmp_path: Path, where: str) -> None:
    """The reference's processor reads only its own files; its tokenizer reads `tokenizer_config.json`."""
    import json

    from transformers import AutoTokenizer

    source = (write_tiny_processor(tmp_path / "new") / "chat_template.jinja").read_text()
    config: dict[str, Any] = {}
    if where == "tokenizer_config.json":
        config = {"chat_template": source}
    elif where != "chat_template.json":
        config = {
            "chat_template": [{"name": "default", "template": source}, {"name": "other", "template": "x"}]
        }
    folder = write_tiny_processor(tmp_path / "old", chat_template=None, tokenizer_config=config)
    if where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": source}))
        expected = ReferenceProcessor.from_pretrained(folder).chat_template
    else:
        expected = AutoTokenizer.from_pretrained(folder).chat_template
    ours = AudioFlamingo3Processor.from_pretrained(folder)
    assert ours.chat_template == expected
    assert ours.apply_chat_template([user("Hi")]).startswith("<|im_start|>system\nYou are")


def test_audio_from_bytes_equals_the_file(processors: Any, clips: dict[str, str]) -> None:
    """A part may hold what the reference takes only as a path."""
    ours, reference = processors["tiny"]
    data = Path(clips["short"]).read_bytes()
    for source in (data, io.BytesIO(data), Path(clips["short"])):
        conversation = [{"role": "user", "content": [{"type": "audio", "audio": source}]}]
        got = ours.apply_chat_template(conversation, tokenize=True, return_dict=True)
        expected = reference.apply_chat_template([user((clips["short"],))], tokenize=True, return_dict=True)
        assert_equal(got, expected)
