"""Every program of `examples/` runs on the built-in model, as its first line says that it is run."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, load_audio
from tests.e2e.conftest import DATA
from tests.support.server_runs import RunningServer, running_server

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = "enter the first three letters of your party"  # in the recording
SPEECH, MONKEYS = str(DATA / "directory_prompt.flac"), str(DATA / "monkeys.ogg")
TESTED = {
    *(
        "ask",
        "stream",
        "chat",
        "several_clips",
        "batch",
        "subtitles",
        "microphone",
        "client",
        "lora",
        "quantize",
    ),
    *("evaluate", "corpus_on_ray", "gradio_app", "lmms_eval_model", "demo"),  # demo: tests/e2e/test_nano.py
}

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as a program and returns what it prints."""

    def program(name: str, *arguments: Any, stdin: str = "", **environment: str) -> str:
        for key, value in {"AF3_MODEL": "nano", **environment}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return program


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two transcribed clips."""
    texts = {SPEECH: "welcome to the directory", MONKEYS: "monkeys"}
    lines = []
    for number, (clip, text) in enumerate(texts.items()):
        content = [{"type": "text", "text": "Transcribe the input speech."}, {"type": "audio", "path": clip}]
        answer = f"The spoken content of the audio is '{text}'."
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": str(number), "messages": turns}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained("nano")
    with running_server(model, processor, served_model_name="nano") as running:
        yield running


def test_no_example_is_left_out() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == TESTED
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(
        f"`{path.name}`" in listed for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")
    )


def test_a_question_is_answered(run: Run) -> None:
    assert "animal" in run("ask", MONKEYS, "What is the sound in this audio?")


def test_words_are_streamed(run: Run) -> None:
    assert SAID in run("stream", SPEECH)


def test_a_chat_reads_its_clip_once(run: Run) -> None:
    first, second = run("chat", SPEECH, stdin="Is someone speaking?\nIs it music?\n").splitlines()
    assert "[0 tokens" in first
    assert int(second.split("[")[1].split()[0]) > 300  # the clip's 304 tokens and the first turn


def test_several_clips_are_asked_about(run: Run) -> None:
    assert run("several_clips", SPEECH, MONKEYS).strip()


def test_a_batch_answers_each(run: Run) -> None:
    answers = [json.loads(line) for line in run("batch", MONKEYS, SPEECH).splitlines()]
    assert [answer["clip"] for answer in answers] == [MONKEYS, SPEECH]
    assert "animal" in answers[0]["answer"]


def test_subtitles_are_written(run: Run, tmp_path: Path) -> None:
    assert "subtitles" in run("subtitles", SPEECH, tmp_path / "out.srt")
    assert (tmp_path / "out.srt").read_text(encoding="utf-8").startswith("1\n00:00:")


def test_the_microphone_is_heard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    waveform = load_audio(SPEECH)

    def record(num_samples: int, samplerate: int, **_: Any) -> np.ndarray:
        assert samplerate == 16000
        return waveform[:num_samples, None]

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(rec=record))
    assert SAID in run("microphone", 12)


def test_a_client_asks_a_server(run: Run, server: RunningServer) -> None:
    transcript, answer = run("client", SPEECH, OPENAI_BASE_URL=f"{server.url}/v1").splitlines()
    assert SAID in transcript
    assert answer


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_asks_a_server(server: RunningServer) -> None:
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
    command = ["bash", str(EXAMPLES / "client.sh"), SPEECH]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.startswith("WEBVTT")
    reply = json.loads(out.splitlines()[-1])
    assert reply["choices"][0]["message"]["content"]


def test_an_adapter_is_trained_and_loaded(run: Run, rows: Path, tmp_path: Path) -> None:
    assert "adapter='mine'" in run("lora", rows, tmp_path / "run")


def test_a_model_is_quantized(run: Run, tmp_path: Path) -> None:
    size, answer = run("quantize", tmp_path / "small", SPEECH).splitlines()
    original = (Path(__file__).parents[2] / "audioflamingo/nano/model.safetensors").stat().st_size
    assert float(size.split()[-4]) < original / 1e6
    assert answer


def test_a_model_is_scored(run: Run, rows: Path) -> None:
    assert "welcome to the directory" in run("evaluate", rows)


def test_a_corpus_is_transcribed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, str(EXAMPLES / "corpus_on_ray.py"), str(tmp_path / "out"), SPEECH]
    environment = {**os.environ, "AF3_MODEL": "nano", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "1 records, 0 of errors" in done.stdout, done.stderr
    record = json.loads((tmp_path / "out" / "transcripts.jsonl").read_text(encoding="utf-8"))
    assert SAID in record["text"]


def test_a_page_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str] = []

    def interface(answer: Callable[[str, str], Iterator[str]], *_: Any, **__: Any) -> Any:
        return types.SimpleNamespace(
            launch=lambda: answers.extend(answer(MONKEYS, "What is the sound in this audio?"))
        )

    parts = {name: lambda *_, **__: None for name in ("Audio", "Textbox")}
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(Interface=interface, **parts))
    run("gradio_app")
    assert "animal" in answers[-1]


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLIP", SPEECH)
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "clear the outputs before committing"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "first_steps.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert "304 audio tokens" in out
    assert SAID in out


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The parts of lmms-eval that a model meets: its base class, which holds the tasks' documents, and the registry."""
    registered: dict[str, Any] = {}

    class Lmms:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    def register_model(name: str) -> Callable[[type], type]:
        return lambda kind: registered.setdefault(name, kind)

    api = {"instance": {"Instance": types.SimpleNamespace}, "model": {"lmms": Lmms}}
    for name, values in {**api, "registry": {"register_model": register_model}}.items():
        module = types.ModuleType(f"lmms_eval.api.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return registered


def test_lmms_eval_asks_the_model(lmms_eval: dict[str, Any]) -> None:
    program = runpy.run_path(str(EXAMPLES / "lmms_eval_model.py"))
    speech = {"array": load_audio(SPEECH)[: 5 * 16000], "sampling_rate": 16000}
    monkeys = {"array": load_audio(MONKEYS), "sampling_rate": 16000}
    docs = [
        {"clip": speech, "question": "Transcribe the input speech.", "answer": "welcome"},
        {"clip": monkeys, "question": "What is the sound in this audio?", "answer": "a monkey"},
    ]
    model = lmms_eval["lmms_eval_model"](pretrained="nano", device="cpu", batch_size="2")
    assert isinstance(model, program["lmms"])
    model.task_dict["task"] = {"test": docs}

    def requests(second: Any) -> list[Any]:
        rest = (lambda doc: [doc["clip"]], 0, "task", "test")
        places = [(*rest[:1], number, *rest[2:]) for number in range(2)]
        return [
            types.SimpleNamespace(args=(doc["question"], second, *place))
            for doc, place in zip(docs, places, strict=True)
        ]

    words, animal = model.generate_until(
        requests({"max_new_tokens": 12, "until": ["\n\n"], "temperature": 0})
    )
    assert (
        words.strip('"').lower().startswith("welcome")
    )  # without the sentence around it; its end was not reached
    assert "animal" in animal
    assert (
        model.generate_until(requests({"max_new_tokens": 12, "until": "an"}))[1]
        == animal.split("an")[0].strip()
    )
    scores = model.loglikelihood(requests(lambda doc: doc["answer"]))
    messages = program["conversation"](docs[1]["question"], [monkeys])
    (expected,) = model.model.score(model.processor, messages, ["a monkey"])
    assert scores[1] == (pytest.approx(expected.logprob), expected.is_greedy)
    assert model.loglikelihood(requests("zebra quartz"))[1][0] < scores[1][0]
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round(requests({}))
