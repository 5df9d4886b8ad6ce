"""`af3` besides `transcribe`: help, defaults, ask, chat, inspect, info."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.cli.ask_command import TASKS, AnswerOptions, split_arguments
from audioflamingo.cli.commands import app
from audioflamingo.cli.model_loading import Dtype, ModelOptions, load
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.processor.processor_options import AudioOptions
from tests.support.cli_runs import af3, af3_process, write_tiny_model

DATA = Path(__file__).parents[2] / "data"
COMMANDS = [command.callback.__name__ for command in app.registered_commands]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip one.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(SAMPLING_RATE) / 9), SAMPLING_RATE)
    return path


def test_what_is_too_long_is_treated_as_by_the_library() -> None:
    """The library's own default is beside torch, which the flags may not import."""
    assert AnswerOptions.on_long == AudioOptions.on_long


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    result = af3(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"af3 {command}" in result.stdout


def test_version_and_completion() -> None:
    assert af3("--version").stdout.startswith("af3 0.")
    result = af3("--show-completion", "bash")
    assert result.exit_code in (0, 1)  # 1: the shell of this test is not known
    assert af3().exit_code == 2  # help, and nothing was asked for


def test_the_command_line_itself_loads_neither_torch_nor_matplotlib() -> None:
    """What the package's own `__init__` imports is not counted."""
    code = (
        "import sys, types, pathlib; p = types.ModuleType('audioflamingo'); "
        "p.__path__ = [str(pathlib.Path('audioflamingo').resolve())]; sys.modules['audioflamingo'] = p; "
        "import audioflamingo.cli.commands; print([m for m in ('torch', 'matplotlib', 'av') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=root, text=True
    )
    assert result.stdout.strip() == "[]"


def test_a_command_is_made_without_the_others() -> None:
    code = (
        "import sys; from audioflamingo.cli.app import build_app; build_app('inspect'); "
        "print(sorted(m for m in sys.modules if m.endswith('_command')))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "['audioflamingo.cli.inspect_command']"


def test_a_process_ends_after_what_is_due_at_its_end() -> None:
    """It ends without taking torch apart: what was registered for the end, threads and buffers must not be lost."""
    code = (
        "import atexit, sys, threading, time, torch; from audioflamingo.cli import main; "
        "atexit.register(print, 'at the end'); "
        "threading.Thread(target=lambda: (time.sleep(0.1), print('a thread'))).start(); "
        "sys.argv = ['af3', 'ask', '/nowhere.wav', 'What?']; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout.split("\n") == ["a thread", "at the end", ""]
    assert result.stderr.startswith("error: ")


def test_ask_streams_an_answer(model: Path, clip: Path) -> None:
    result = af3("ask", clip, clip, "Which one?", "--model", model, "--max-new-tokens", "5", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")
    again = af3("ask", clip, "--task", "transcribe", "--model", model, "--max-new-tokens", "5")
    assert again.exit_code == 0


def test_ask_takes_standard_input(model: Path, clip: Path) -> None:
    arguments = ["--model", model, "--max-new-tokens", "5", "-q"]
    piped = af3("ask", "-", "What?", *arguments, input=clip.read_bytes())
    assert (piped.exit_code, piped.stdout) == (0, af3("ask", clip, "What?", *arguments).stdout)


def test_ask_samples_repeatably(model: Path, clip: Path) -> None:
    arguments = ["ask", clip, "What?", "--model", model, "--max-new-tokens", "8", "--temperature", "2"]
    answers = [af3(*arguments, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clip.wav"], "the last argument is the question"),
        (["clip.wav", "other.mp3"], "the last argument is the question"),
        (["a.wav", "what is this?", "--task", "sound"], "brings its own question"),
        (["a.wav", "what?", "--task", "nope"], "nope"),
    ],
)
def test_ask_without_a_clear_question(arguments: list[str], words: str) -> None:
    result = af3("ask", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_ask_about_a_file_that_is_not_there_loads_no_model() -> None:
    result = af3("ask", "nowhere.wav", "What?", "--model", "/nowhere")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 'nowhere.wav': there is no such file.")


def test_every_task_has_a_prompt(clip: Path) -> None:
    for name, task in TASKS.items():
        assert split_arguments([str(clip)], name) == ([str(clip)], task.prompt)


def test_chat_keeps_the_conversation(model: Path, clip: Path, tmp_path: Path) -> None:
    saved = tmp_path / "my talk.json"
    lines = [
        "What is this?", "", "/add nowhere.wav", f"/add '{clip}'", "and this?", "/help", "/add", "/dance",
        f"/save {saved}", f"/save {saved}", "/quit", "never asked",
    ]  # fmt: skip
    result = af3("chat", clip, "--model", model, "--max-new-tokens", "4", input="\n".join(lines))
    assert result.exit_code == 0
    errors = result.stderr.splitlines()
    assert any("nowhere.wav': there is no such file" in line for line in errors)
    assert any(line.startswith("clip 2: ") for line in errors)
    assert "/add needs the name of a file." in errors
    assert any("there is no command /dance" in line for line in errors)
    assert any("exists; choose another name" in line for line in errors)
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"][0] == {"type": "audio", "clip": 2, "duration_s": 1.0}
    assert "never asked" not in saved.read_text()


def test_inspect_shows_windows_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = DATA / "congratulations_prompt.ogg"
    result = af3("inspect", source, "--mels", "80")
    assert result.exit_code == 0
    assert "audio tokens  757 in 2 windows" in result.stdout
    assert "opus, 48000 Hz, 1 channel" in result.stdout
    picture = tmp_path / "congratulations_prompt.af3.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == [picture.name]
    refused = af3("inspect", source, "--png", picture)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    facts = json.loads(af3("inspect", source, "--json", "--no-png").stdout)
    assert facts["num_audio_tokens"] == 757
    assert [w["num_frames"] for w in facts["windows"]] == [3000, 28]
    assert 26 < sum(w["speech_s"] for w in facts["windows"]) < 30.3


def test_inspect_without_matplotlib(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    result = af3("inspect", clip)
    assert result.exit_code == 0
    assert "pip install 'audioflamingo[plot]'" in result.stderr
    assert af3("inspect", clip, "--png", "x.png").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_info_reads_no_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("audioflamingo.checkpoint.fill_weights.safe_open", safetensors.safe_open)
    result = af3("info", model)
    assert result.exit_code == 0
    for words in (
        "hub layout (as published)",
        "audio encoder             80,512",
        "model.safetensors",
        "context 20000",
    ):
        assert words in result.stdout
    facts = json.loads(af3("info", model, "--json").stdout)
    assert facts["parameters"]["total"] == sum(
        n for part, n in facts["parameters"].items() if part != "total"
    )
    assert facts["stored"]["parameters_by_dtype"] == {"float32": facts["parameters"]["total"]}
    assert "<|im_start|>" in af3("info", model, "--template").stdout


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        (
            {"alignment_heads": [[0, 1]], "alignment_share": 0.75},
            "word times by heads 0.1 (layer.head); 75% of",
        ),
        ({"alignment_heads": [[0, 1]]}, "are found when words are first timed"),  # as in Whisper's: no share
        ({"alignment_heads": [[0, 99]], "alignment_share": 0.75}, "are found when words are first timed"),
    ],
    ids=["ours", "without a share", "of another model"],
)
def test_info_tells_the_heads_of_word_times(
    model: Path, tmp_path: Path, named: dict[str, Any], shown: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "named")
    file = folder / "generation_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | named))
    result = af3("info", folder)
    assert result.exit_code == 0, result.stderr
    assert shown in result.stdout


def test_info_of_what_is_no_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = af3("info", folder)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1


def test_the_model_can_come_from_the_environment(
    model: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AF3_MODEL", str(model))
    assert af3("ask", clip, "What?", "--max-new-tokens", "3").exit_code == 0
    assert str(model) in af3("info").stdout


def test_a_reader_that_goes_away(model: Path) -> None:
    """`af3 ... | head`: no traceback."""
    process = af3_process("info", model, "--template")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=60) in (0, 1)
    assert b"Traceback" not in errors


def test_training_is_reached(tmp_path: Path) -> None:
    result = af3("train", tmp_path / "nowhere.yaml")
    assert result.exit_code == 1
    assert "nowhere.yaml" in result.stderr


def test_unexpected_errors_keep_their_traceback(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("audioflamingo.cli.ask_command.load_with_adapter", broken)
    assert isinstance(af3("ask", clip, "What?").exception, RuntimeError)


def test_weights_in_half_precision_are_widened_on_a_cpu(model: Path, tmp_path: Path) -> None:
    """float16 is slow and narrow there. Every command loads in the same way, `evaluate` too."""
    folder = tmp_path / "half"
    AudioFlamingo3ForConditionalGeneration.from_pretrained(model, dtype="float16").save_pretrained(folder)
    AudioFlamingo3Processor.from_pretrained(model).save_pretrained(folder)
    for dtype, loaded in ((Dtype.AUTO, "float32"), (Dtype.FLOAT16, "float16"), (Dtype.BFLOAT16, "bfloat16")):
        half, _ = load(ModelOptions(str(folder), device="cpu", dtype=dtype))
        assert str(half.dtype) == f"torch.{loaded}"
