"""Tokenizer: text to ids and back, control tokens, files."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Backend

from audioflamingo.errors import ArgumentError, CheckpointError, PromptError
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer
from tests.support.tiny_tokenizer import (
    AUDIO_TOKEN_ID,
    CONTROL_TOKENS,
    TINY_VOCABULARY_SIZE,
    build_tiny_backend,
    write_json,
    write_tiny_processor,
)

TOKENIZER = Tokenizer(build_tiny_backend(), {"eos_token": "<|im_end|>"})
PIECES = [*CONTROL_TOKENS, "<", "<|", "im_end|>", "sound", ">", " ", "\n", "the", "é", "e\u0301", "🙂", "你"]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def build_original_layout(folder: Path, **config: Any) -> Path:
    """The tiny tokenizer as NVIDIA's checkpoints store theirs: vocab.json, merges.txt, no tokenizer.json."""
    folder.mkdir(parents=True)
    backend = build_tiny_backend()
    backend.model.save(str(folder))
    tokens = {
        str(backend.token_to_id(token)): {"content": token, "special": special, "normalized": False}
        for token, special in CONTROL_TOKENS.items()
    }
    write_json(
        folder / "tokenizer_config.json", {"added_tokens_decoder": tokens, "eos_token": "<|im_end|>"} | config
    )
    return folder


def test_prompt_and_plain_text_differ_in_control_tokens_only() -> None:
    text = "<|im_start|>user\n<sound>the<|im_end|>"
    prompt, plain = TOKENIZER.encode_prompt(text), TOKENIZER.encode_plain(text)
    assert prompt.count(AUDIO_TOKEN_ID) == 1
    assert not set(plain) & set(TOKENIZER.control_tokens.values())
    assert TOKENIZER.decode(prompt) == TOKENIZER.decode(plain) == text


def test_ids_equal_those_of_the_library() -> None:
    backend = build_tiny_backend()
    text = " the\n\n <|im_start|>user\n<sound>Transcribe  e\u0301 🙂<tool_call></tool_call><|im_end|>\n"
    assert TOKENIZER.encode_prompt(text) == backend.encode(text, add_special_tokens=False).ids


@given(text=texts)
@settings(deadline=None)
def test_guarded_text_has_no_control_tokens(text: str) -> None:
    """What a user wrote stays text, between control tokens of the template and beside halves of them."""
    marker = "\ufdd0"
    borders = [("<sound>", "<|im_end|>"), ("", "")]
    if text:  # else the two halves are the template's own token
        borders += [("<", ">"), ("<so", "und>"), ("<|im_", "im_end|>")]
    for before, after in borders:
        pieces = list(TOKENIZER.split(before + TOKENIZER.guard(text, marker) + after))
        expected = [token for token in (before, after) if token in CONTROL_TOKENS]
        assert [piece for piece, token_id in pieces if token_id is not None] == expected
        assert "".join(piece for piece, _ in pieces).replace(marker, "") == before + text + after


def test_longest_control_token_wins() -> None:
    backend = build_tiny_backend()
    backend.add_tokens([AddedToken("<sound><sound>", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode_prompt("<sound><sound><sound>") == backend.encode("<sound><sound><sound>").ids


def test_spaces_around_a_stripping_token_take_linear_time() -> None:
    """A token that swallows the spaces before it is searched for once in a run of them."""
    backend = build_tiny_backend()
    backend.add_tokens([AddedToken("<a>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer = Tokenizer(backend)
    text = " " * 200_000 + "x"
    assert list(tokenizer.split(text)) == [(text, None)]
    assert tokenizer.encode_prompt("x  <a>  <a> y") == backend.encode("x  <a>  <a> y").ids


@pytest.mark.parametrize("skip", [False, True])
@given(
    ids=st.lists(st.integers(0, TINY_VOCABULARY_SIZE + 5), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_stream_equals_decode(skip: bool, ids: list[int], cuts: list[int]) -> None:
    """Any ids, in any portions, broken UTF-8 and ids without token among them."""
    decoder = StreamDecoder(TOKENIZER, skip_special_tokens=skip)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    portions = [ids[a:b] for a, b in pairwise(borders)]
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert "".join([*map(decoder.put, portions), decoder.end()]) == whole
    assert "".join([*map(decoder.put, ids), decoder.end()]) == whole, "the decoder did not start anew"


@given(text=st.text(max_size=20))
@settings(deadline=None)
def test_stream_never_gives_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode_plain(text)
    whole = TOKENIZER.decode(ids)
    decoder = StreamDecoder(TOKENIZER)
    shown = ""
    for token_id in ids:
        shown += decoder.put(token_id)
        assert whole.startswith(shown)
    assert decoder.end() == ""
    assert shown == whole


def test_stream_takes_tensors_and_ends_an_unfinished_character() -> None:
    decoder = StreamDecoder(TOKENIZER)
    ids = TOKENIZER.encode_plain("a🙂")
    assert decoder.put(torch.tensor(ids[:-1])) == "a"
    assert decoder.end() == "\ufffd"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_decode_takes_rows_and_batches(kind: Any) -> None:
    row = TOKENIZER.encode_plain("the end")
    assert TOKENIZER.decode(kind(row)) == "the end"
    assert TOKENIZER.decode(kind([row, row])) == ["the end", "the end"]
    assert TOKENIZER.decode([torch.tensor(row), torch.tensor(row[:1])]) == ["the end", "the"]
    assert TOKENIZER.decode(row[0]) == "the"
    assert TOKENIZER.decode([]) == ""
    assert TOKENIZER.decode(torch.zeros(2, 0, dtype=torch.long)) == ["", ""]
    assert TOKENIZER.decode(torch.zeros(0, 3, dtype=torch.long)) == []


@pytest.mark.parametrize(
    "ids", [[-100, 3], [1.5], "text", [[1], 2], torch.zeros(1, 1, 1), torch.tensor([0.5]), None]
)
def test_decode_refuses_what_are_no_ids(ids: Any) -> None:
    with pytest.raises(ArgumentError):
        TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["\ud800", None, 3, b"bytes"])
def test_only_valid_text_is_encoded(text: Any) -> None:
    with pytest.raises(PromptError):
        TOKENIZER.encode_prompt(text)
    with pytest.raises(PromptError):
        TOKENIZER.encode_plain(text)


def test_token_lookup() -> None:
    assert TOKENIZER.convert_tokens_to_ids("<sound>") == AUDIO_TOKEN_ID
    assert TOKENIZER.convert_tokens_to_ids(["<sound>", "<sound>"]) == [AUDIO_TOKEN_ID] * 2
    with pytest.raises(CheckpointError, match="<image>"):
        TOKENIZER.convert_tokens_to_ids("<image>")
    assert len(TOKENIZER) == TINY_VOCABULARY_SIZE


def test_special_ids_are_read(tmp_path: Path) -> None:
    config = {
        "pad_token": "<tool_call>",
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|endoftext|>"},
    }
    tokenizer = Tokenizer.from_folder(write_tiny_processor(tmp_path, tokenizer_config=config))
    found = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert found == tuple(
        map(tokenizer.convert_tokens_to_ids, ("<tool_call>", "<|im_start|>", "<|endoftext|>"))
    )


def test_special_ids_that_are_not_named(tmp_path: Path) -> None:
    """Qwen2's default where the configuration is silent, None where it says null or is of another class."""
    write_tiny_processor(tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    write_json(config_file, {"tokenizer_class": "Qwen2Tokenizer"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (end, end, None)
    write_json(config_file, {"tokenizer_class": "Qwen2Tokenizer", "pad_token": None})
    assert Tokenizer.from_folder(tmp_path).pad_token_id is None
    write_json(config_file, {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert Tokenizer.from_folder(tmp_path).eos_token_id is None


def test_special_tokens_map_of_older_folders(tmp_path: Path) -> None:
    write_tiny_processor(tmp_path)
    write_json(
        tmp_path / "special_tokens_map.json", {"pad_token": {"content": "<tool_call>", "lstrip": False}}
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<tool_call>")


@pytest.mark.parametrize("subfolder", [".", "llm"])
@pytest.mark.parametrize("older", [False, True])
def test_original_layout(tmp_path: Path, subfolder: str, older: bool) -> None:
    """vocab.json and merges.txt, with the control tokens in either of two files, give the same tokenizer."""
    folder = build_original_layout(tmp_path / "checkpoint" / subfolder)
    if older:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        tokens = config.pop("added_tokens_decoder")
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "added_tokens.json", {token["content"]: int(i) for i, token in tokens.items()})
    tokenizer = Tokenizer.from_folder(tmp_path / "checkpoint")
    text = "It's e\u0301 12  \n\n<|im_start|>user\n<sound>the<tool_call> end<|im_end|>\n"
    assert tokenizer.encode_prompt(text) == TOKENIZER.encode_prompt(text)
    assert tokenizer.control_tokens == TOKENIZER.control_tokens


def test_added_tokens_with_other_ids_are_refused(tmp_path: Path) -> None:
    tokens = {"700": {"content": "<sound>", "special": True}}
    folder = build_original_layout(tmp_path / "checkpoint", added_tokens_decoder=tokens)
    with pytest.raises(CheckpointError, match=r"<sound>.*700.*495"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer in"),
        ("tokenizer.json", '{"model": ', "is not a tokenizer"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe\x00", "cannot read"),
        ("tokenizer_config.json", '{"eos_token": ', "is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "damaged"),
        ("chat_template.json", '{"chat_template": 3}', "not text"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    folder = write_tiny_processor(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


def test_merges_that_do_not_fit(tmp_path: Path) -> None:
    folder = build_original_layout(tmp_path / "checkpoint")
    (folder / "merges.txt").write_text("#version: 0.2\nxx yy\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt"):
        Tokenizer.from_folder(folder)


def test_tokenizers_of_other_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match="byte-level BPE"):
        Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")))
    backend = build_tiny_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<sound> $A", special_tokens=[("<sound>", 500)]
    )
    with pytest.raises(CheckpointError, match="adds tokens"):
        Tokenizer(backend)


def test_save_and_load(tmp_path: Path) -> None:
    folder = write_tiny_processor(
        tmp_path / "first", tokenizer_config={"some_key": [1], "pad_token": "[PAD]"}
    )
    first = Tokenizer.from_folder(folder)
    first.save(tmp_path / "second")
    second = Tokenizer.from_folder(tmp_path / "second")
    assert second.control_tokens == first.control_tokens
    assert second.special_tokens_map == first.special_tokens_map
    assert second.chat_template == first.chat_template
    assert second.config["some_key"] == [1]
    second.save(tmp_path / "third")
    for file in (tmp_path / "second").iterdir():
        assert (tmp_path / "third" / file.name).read_bytes() == file.read_bytes()


def test_named_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    folder = write_tiny_processor(
        tmp_path / "a", chat_template=None, tokenizer_config={"chat_template": templates}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template == {"default": "D", "tools": "T"}
    tokenizer.save(tmp_path / "b")
    assert Tokenizer.from_folder(tmp_path / "b").chat_template == {"default": "D", "tools": "T"}
    assert "chat_template" not in json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    tokenizer.chat_template = {"../escape": "x"}
    with pytest.raises(CheckpointError, match="escape"):
        tokenizer.save(tmp_path / "c")


def test_a_saved_template_is_not_hidden_by_an_older_file(tmp_path: Path) -> None:
    """`chat_template.json` is read before `chat_template.jinja`, so a save must not leave an old one."""
    write_json(write_tiny_processor(tmp_path) / "chat_template.json", {"chat_template": "old"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == "old"
    tokenizer.chat_template = "new"
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_template == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = write_tiny_processor(tmp_path / "folder")
    shutil.copytree(folder, tmp_path / "copy")

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, fail)
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(CheckpointError, match="No space left"):
        tokenizer.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        file.name for file in (tmp_path / "copy").iterdir()
    )
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "copy" / file.name).read_bytes()


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save"):
        TOKENIZER.save(tmp_path / "file")
