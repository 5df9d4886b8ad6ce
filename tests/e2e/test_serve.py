"""`af3 serve` as a process: the built-in model, the official client, a signal at the end."""

from __future__ import annotations

import base64
import io
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from audioflamingo.transcription import transcribe
from tests.support.cli_runs import ROOT, af3, af3_process

DATA = Path(__file__).parents[1] / "data"
SPEECH = DATA / "directory_prompt.flac"
START_S = 120


def read_line(process: subprocess.Popen[bytes], end: float) -> dict[str, Any]:
    """The next line of the log."""
    assert process.stderr is not None
    ready, _, _ = select.select([process.stderr], [], [], max(0, end - time.monotonic()))
    assert ready, "no line in time"
    line = process.stderr.readline()
    assert line, "the process has ended"
    return json.loads(line)


def start(*options: str, cwd: Path = ROOT) -> tuple[subprocess.Popen[bytes], str, list[dict[str, Any]]]:
    """Starts the server; its address, and what it logged until then."""
    process = af3_process("serve", "--port", "0", "--cache-tokens", "20000", *options, bufsize=0, cwd=cwd)
    end = time.monotonic() + START_S
    lines: list[dict[str, Any]] = []
    while not lines or lines[-1]["message"] != "listening":
        lines.append(read_line(process, end))
    return process, lines[-1]["address"].replace("0.0.0.0", "127.0.0.1"), lines


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process, address, _ = start()
    yield address
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, log.decode()  # uvicorn ends in order, then by the signal
    assert b"Application shutdown complete" in log
    assert b"traceback" not in log


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_a_recording_is_transcribed(client: openai.OpenAI) -> None:
    with SPEECH.open("rb") as file:
        reply = client.audio.transcriptions.create(model="nano", file=file, response_format="verbose_json")
    assert reply.segments
    assert reply.segments[-1].end <= reply.duration + 1e-3
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    segments = list(transcribe(model, AutoProcessor.from_pretrained("nano"), SPEECH))
    assert [segment.text for segment in reply.segments] == [segment.text for segment in segments]


def test_a_conversation_about_a_recording(client: openai.OpenAI) -> None:
    data = base64.b64encode(SPEECH.read_bytes()).decode()
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}},  # type: ignore[dict-item]
                {"type": "text", "text": "Transcribe the input speech."},
            ],
        }
    ]
    stream = client.chat.completions.create(model="nano", messages=messages, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text
    again = client.chat.completions.create(model="nano", messages=messages, temperature=0)
    assert again.choices[0].message.content == text
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_curl_gets_plain_text(address: str) -> None:
    command = [
        "curl",
        "-sS",
        f"{address}/v1/audio/transcriptions",
        "-F",
        f"file=@{SPEECH}",
        "-F",
        "model=nano",
    ]
    reply = subprocess.run(
        [*command, "-F", "response_format=srt"], capture_output=True, check=True, timeout=60
    )
    assert reply.stdout.startswith(b"1\n00:00:")


SOUNDS = {
    "silence": np.zeros(48000),
    "faint noise": 1e-4 * np.random.default_rng(0).standard_normal(80000),
    "loud noise": 0.1 * np.random.default_rng(1).standard_normal(80000),
    "hum": 0.3 * np.sin(2 * np.pi * 50 * np.arange(80000) / 16000),
}


@pytest.mark.parametrize("sound", SOUNDS)
def test_context_is_never_heard_where_nobody_speaks(client: openai.OpenAI, sound: str) -> None:
    """Neither the hint nor hot words, in a whole answer, in one with times, or in a stream."""
    context = "Zebulon Quartermaine of Kowloon"
    wav = io.BytesIO()
    soundfile.write(wav, SOUNDS[sound], 16000, format="WAV")
    asked: dict[str, Any] = {"model": "nano", "file": ("a.wav", wav.getvalue()), "prompt": context}
    asked["extra_body"] = {"hotwords": context.replace(" ", ", ")}
    transcriptions = client.audio.transcriptions
    reply = transcriptions.with_raw_response.create(**asked)
    assert (reply.parse().text, reply.headers["x-no-speech"]) == ("", "true")
    reply = transcriptions.create(**asked, response_format="verbose_json", timestamp_granularities=["word"])
    assert (reply.text, reply.segments, reply.words) == ("", [], [])
    (done,) = transcriptions.create(**asked, stream=True)
    assert (done.type, done.text, done.no_speech) == ("transcript.text.done", "", True)


def test_an_open_server_without_a_key_warns_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process, address, lines = start("--host", "0.0.0.0")
    assert any(line["level"] == "warning" and "without a key" in line["message"] for line in lines)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with SPEECH.open("rb") as file:
        stream = client.audio.transcriptions.create(model="nano", file=file, stream=True)
        next(iter(stream))
    process.kill()  # a crash: nothing may stay behind
    process.communicate(timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("audioflamingo.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = af3("serve")
    assert result.exit_code == 1
    assert "pip install 'audioflamingo[server]'" in result.output
