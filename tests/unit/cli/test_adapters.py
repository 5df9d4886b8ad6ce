"""`af3 ask --adapter`, `--think` and `--show-thoughts`, `af3 merge`, `preset="nvidia"`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor, Chat
from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.cli.ask_command import print_answer
from audioflamingo.errors import ArgumentError, PromptError
from audioflamingo.tasks import THINK_SUFFIX
from tests.support.adapter_folders import save_adapter
from tests.support.cli_runs import af3, write_tiny_model
from tests.support.tiny_family import tiny_music_model, write_music_processor
from tests.support.tiny_model import tiny_reference

pytest.importorskip("peft", reason="needs peft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    save_adapter(folder / "think", tiny_reference(), lora_alpha=20)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(SAMPLING_RATE) / 9), SAMPLING_RATE)
    return path


def library_answer(folder: Path, clip: Path, question: str, adapter: Path | None) -> str:
    model = AutoModelForConditionalGeneration.from_pretrained(folder)
    if adapter is not None:
        model.load_adapter(adapter, "its own")
    chat = Chat(model, AutoProcessor.from_pretrained(folder), adapter=None if adapter is None else "its own")
    chat.add_audio(str(clip))
    return "".join(chat.ask(question, max_new_tokens=8))


def test_ask_with_an_adapter(model: Path, clip: Path) -> None:
    think = model / "think"
    ask = ("ask", clip, "What is it?", "--model", model, "--max-new-tokens", 8)
    for arguments, question, adapter in (
        ((), "What is it?", None),
        (("--adapter", think), "What is it?", think),
        (("--think",), f"What is it?\n{THINK_SUFFIX}", think),
    ):
        result = af3(*ask, *arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == library_answer(model, clip, question, adapter) + "\n", arguments


def test_thinking_without_an_adapter_is_refused(clip: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    result = af3("ask", clip, "What is it?", "--model", tmp_path, "--think")
    assert result.exit_code == 1
    assert "comes without an adapter for it (looked for think and stage35" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_music_flamingo_thinks_without_one(clip: Path, tmp_path: Path) -> None:
    write_music_processor(tmp_path)
    tiny_music_model().save_pretrained(tmp_path)
    result = af3("ask", clip, "What is it?", "--model", tmp_path, "--think", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.stderr


def test_merge(model: Path, clip: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    result = af3("merge", merged, "--adapter", model / "think", "--model", model)
    assert result.exit_code == 0, result.stderr
    shutil.copytree(model / "think", tmp_path / "think")
    got = af3("ask", clip, "What is it?", "--model", merged, "--max-new-tokens", 8).stdout
    assert got == library_answer(model, clip, "What is it?", tmp_path / "think") + "\n"


def test_merging_nothing(model: Path, tmp_path: Path) -> None:
    result = af3("merge", tmp_path / "merged", "--adapter", tmp_path, "--model", model)
    assert result.exit_code == 1
    assert "holds no adapter" in result.stderr
    assert not (tmp_path / "merged").exists()
    before = {path: path.read_bytes() for path in model.iterdir() if path.is_file()}
    result = af3("merge", model, "--adapter", model / "think", "--model", model)
    assert result.exit_code == 1
    assert "is the model itself, which is never changed" in result.stderr
    assert all(path.read_bytes() == content for path, content in before.items())


def test_thoughts_at_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def pieces():
        yield from ("<think>", "A dog.", "</th", "ink>\nWoof", ".")

    print_answer(pieces())
    assert capsys.readouterr().out == "Woof.\n"
    print_answer(pieces(), shows_thoughts=True)
    assert capsys.readouterr().out == "A dog.\n\nWoof.\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_answer(pieces())
    assert capsys.readouterr().out == "\x1b[2mA dog.\x1b[0m\n\nWoof.\n"


def test_nvidias_line_feeds(model: Path) -> None:
    processor = AutoProcessor.from_pretrained(model)
    audio = {"type": "audio", "audio": np.zeros(1600, dtype=np.float32)}

    def body(*parts) -> str:
        content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
        text = processor.apply_chat_template([{"role": "user", "content": content}], preset="nvidia")
        return text.split("<|im_start|>user\n")[1].removesuffix("<|im_end|>\n")

    assert body(audio, "What is it?") == body("What is it? ", audio) == "<sound>\nWhat is it?"
    assert body(audio, audio, " Which one? ") == "<sound><sound>\nWhich one?"
    assert body("First ", audio, " and then", audio) == "First\n<sound>\nand then\n<sound>"
    assert body("no clip <sound>") == "no clip <sound>"
    assert body(audio, "Is <sound> ", "a dog?") == body("Is <sound-1> a dog?", audio) == "Is\n<sound>\na dog?"
    assert body(audio, audio, "<sound-2><sound> or not") == "<sound><sound>\nor not"
    with pytest.raises(PromptError, match=r"<sound-3> names no clip: the message has 2"):
        body(audio, audio, "<sound-3> or <sound>")
    with pytest.raises(PromptError, match=r"<sound> names no clip: the message has 1"):
        body(audio, "<sound> and <sound>")
    with pytest.raises(PromptError, match=r"but not where <sound-1>; add it"):
        body(audio, audio, "<sound-2>")
    first, second = (np.full(n, 0.1, np.float32) for n in (16000, 48000))
    content = [
        *({"type": "audio", "audio": clip} for clip in (first, second)),
        {"type": "text", "text": "<sound-2>.<sound>"},
    ]
    message = {"role": "user", "content": content}
    windows = processor.prompt([message], preset="nvidia").windows
    assert [window.num_tokens for window in windows] == [75, 25]  # the second clip first
    with pytest.raises(ArgumentError, match="preset='x': it must be 'nvidia' or None"):
        processor.apply_chat_template([{"role": "user", "content": "x"}], preset="x")
