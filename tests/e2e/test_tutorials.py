"""The commands of the documentation, typed page by page in a folder with the files that they name: each does its work.

The built-in model answers for every other. A block with a title is a file of the reader's.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, load_audio
from audioflamingo.hub import resolve_folder
from tests.e2e.conftest import DATA
from tests.e2e.test_documentation import PAGES, ROOT, blocks, commands
from tests.e2e.test_serve import start
from tests.support.adapter_folders import save_adapter
from tests.support.audio_files import encode
from tests.support.cli_runs import af3, af3_process
from tests.support.live_speech import pcm
from tests.support.server_runs import running_server

FOLLOWED = [page for page in PAGES if commands(page)]
# What keeps a line from being followed, by how it begins.
NOT_FOLLOWED = {
    "af3 listen": "needs a microphone",
    "af3 train recipes/": "tests/unit/training/test_recipes.py runs it",
    "af3 transcribe corpus.jsonl -o out/ --engine ray --address": "needs a cluster of several machines",
    "af3 transcribe recordings/ -o out/ --engine ray": "tests/unit/corpus/test_ray.py and test_examples.py run it",
    "export": "the built-in model answers for every other",
    "make": "runs the tests",
    "pip install": "the tests run where all is installed",
}
MODELS = ("nvidia/audio-flamingo-3-hf", "nvidia/music-flamingo-2601-hf")
SPOKEN = (
    *("talk.mp3", "talk.wav", "first.wav", "episode.mp3", "interview.flac", "a1.wav", "season/one.mp3"),
    *("recordings/one.wav", "recordings/two.wav", "MMAR/audio/one.wav", "data/one.wav"),
)
SOUNDS = ("second.wav", "song.mp3", "cover.mp3")
ANSWER = "The spoken content of the audio is 'Welcome to the directory.'"
# What lies there when a page was followed.
LEFT = {
    "adapters": ("merged/model.safetensors",),
    "laptop": ("af3-int4/model.safetensors",),
    "paper": ("runs/test/items.jsonl", "runs/mmar/report.html", "runs/mmar-official/submission.jsonl"),
    "podcast": ("out/episode.srt", "out/one.jsonl"),
    "voice": (
        "runs/voice/best/adapter/adapter_model.safetensors",
        "runs/after/items.jsonl",
        "merged/config.json",
    ),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the built-in model, with weights at random."""
    pytest.importorskip("peft", reason="needs peft")
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, AudioFlamingo3ForConditionalGeneration.from_pretrained("nano"))
    return folder


@pytest.fixture
def scene(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that somebody stands in who has what the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    speech, monkeys = (
        load_audio(DATA / "directory_prompt.flac")[: 4 * 16000],
        load_audio(DATA / "monkeys.ogg"),
    )
    for names, waveform in ((SPOKEN, speech), (SOUNDS, monkeys)):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(encode(waveform[:, None], 16000, name.rpartition(".")[2]))
    Path("corpus.jsonl").write_text('{"path": "talk.wav"}\n', encoding="utf-8")
    question = {"from": "human", "value": "<sound>\nTranscribe the input speech."}
    row = {
        "id": "one",
        "sound": "one.wav",
        "duration": 4.0,
        "conversations": [question, {"from": "gpt", "value": ANSWER}],
    }
    Path("data/test.json").write_text(json.dumps([row]), encoding="utf-8")
    options = {"question": "Is it speech?", "choices": ["Yes", "No"], "answer": "Yes"}
    kinds = {"modality": "speech", "category": "Signal Layer", "sub-category": "Noise"}
    row = {"id": "one", "audio_path": "./audio/one.wav", **options, **kinds}
    Path("MMAR/MMAR-meta.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for name in ("lora", "think", "audio-flamingo-3-hf/think"):
        shutil.copytree(adapter, name)
    for path in Path(resolve_folder("nano")).iterdir():
        Path("audio-flamingo-3-hf", path.name).symlink_to(path)
    return tmp_path


def write_files(page: Path) -> None:
    """Writes the page's blocks with a title; validation rows are the training's."""
    for name, text in re.findall(
        r'```\w+ title="(.+?)"\n(.*?)```', page.read_text(encoding="utf-8"), re.DOTALL
    ):
        Path(name).write_text(replaced(text), encoding="utf-8")
    if Path("train.jsonl").exists():
        shutil.copy("train.jsonl", "valid.jsonl")


def replaced(text: str) -> str:
    for model in MODELS:
        text = text.replace(model, "nano")
    return text.replace('"$KEY"', "secret").replace("$KEY", "secret")


def lines(page: Path) -> Iterator[list[str]]:
    """The words of each line of a page's shell blocks that can be followed."""
    for line in "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(replaced(line), comments=True)
        is_piped = "|" in words
        if words and (is_piped or not any(line.startswith(begin) for begin in NOT_FOLLOWED)):
            yield words


def follow(words: list[str], stack: ExitStack, address: list[str]) -> None:
    """Does what a line says; a server runs until the page ends."""
    name, *arguments = words[words.index("|") + 1 :] if "|" in words else words
    if name == "curl":
        words = [word.replace("http://127.0.0.1:8000", address[-1]) for word in words]
        done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        return
    assert name == "af3", f"{words}: follow it, or say in NOT_FOLLOWED why not"
    if arguments[0] == "serve":
        process, url, _ = start(*arguments[1:], cwd=Path.cwd())
        stack.callback(process.communicate, timeout=60)
        stack.callback(process.send_signal, signal.SIGTERM)
        address.append(url)
    elif arguments[0] == "listen":  # wants a pipe of its own
        process = af3_process(*arguments, cwd=Path.cwd())
        _, errors = process.communicate(pcm(load_audio("talk.wav")), timeout=300)
        assert process.returncode == 0, errors.decode()
    else:
        result = af3(*arguments, input="Is it music?\n" if arguments[0] == "chat" else None)
        assert result.exit_code == 0, (words, result.output)
        assert result.output.strip(), words


@pytest.mark.parametrize("page", [page for page in FOLLOWED if list(lines(page))], ids=lambda page: page.stem)
def test_a_page_is_followed(page: Path, scene: Path) -> None:
    write_files(page)
    address: list[str] = []
    with ExitStack() as stack:
        for words in lines(page):
            follow(words, stack, address)
    assert [name for name in LEFT.get(page.stem, ()) if not (scene / name).exists()] == []


def test_what_is_not_followed_is_still_there() -> None:
    text = "\n".join(
        line for page in FOLLOWED for block in blocks(page, "bash", "sh") for line in block.splitlines()
    )
    assert [
        begin for begin in NOT_FOLLOWED if not re.search(f"^{re.escape(begin)}", text, re.MULTILINE)
    ] == []


def test_the_program_for_live_speech_runs() -> None:
    """The server ends when the first words are there: the program itself would listen for ever."""
    (program,) = blocks(ROOT / "docs" / "how-to" / "live.md", "py")
    speech = soxr.resample(load_audio(DATA / "directory_prompt.flac")[: 4 * 16000], 16000, 24000)
    pieces = [pcm(piece) for piece in np.array_split(np.concatenate([speech, np.zeros(24000)]), 10)]
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    said: list[str] = []
    with running_server(model, AutoProcessor.from_pretrained("nano"), served_model_name="nano") as server:
        end = threading.Thread(target=server.stop)

        def show(text: str) -> None:
            said.append(text)
            end.start()

        program = program.replace("http://127.0.0.1:8000", server.url)
        exec(compile(program, "live.md", "exec"), {"pieces": pieces, "print": show})
        end.join()
    assert said[0].lower().startswith("welcome to the directory")
