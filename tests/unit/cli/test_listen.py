"""`af3 listen`: what comes through a pipe or a microphone, and what is written of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr

from audioflamingo.cli import listen_command
from audioflamingo.cli.live_sound import LiveSound, listen_to_pipe
from audioflamingo.errors import MissingDependencyError
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.cli_runs import af3, af3_process, write_tiny_model
from tests.support.live_speech import NUMBERS, count_seconds, pcm, talk_with_pauses
from tests.support.scripted_model import ScriptedModel, tiny_processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return tiny_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def talk() -> np.ndarray:
    return talk_with_pauses()


def pieces(waveform: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


def reader(data: bytes, size: int = 999) -> Callable[[int], bytes]:
    """A pipe that gives what it has in pieces that end in the middle of samples."""
    left = bytearray(data)

    def read(num_bytes: int) -> bytes:
        piece = bytes(left[: min(size, num_bytes)])
        del left[: len(piece)]
        return piece

    return read


def test_a_pipe_is_heard_to_the_last_sample(talk: np.ndarray) -> None:
    got = np.concatenate(list(listen_to_pipe(reader(pcm(talk)), 16000).blocks()))
    assert len(got) == len(talk)
    assert np.abs(got - talk).max() < 1e-3


def test_what_does_not_fit_is_counted() -> None:
    sound = LiveSound(16000)
    for _ in range(3001):
        sound.put(bytes(3200), waits=False)
    assert sound.lost_s == pytest.approx(0.1)
    sound.stop()
    assert sum(len(block) for block in sound.blocks()) == 3000 * 1600


@pytest.fixture
def model(processor: AudioFlamingo3Processor, monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    model = ScriptedModel(processor, count_seconds)
    monkeypatch.setattr(listen_command, "load_with_adapter", lambda *_: (model, processor, None))
    return model


def test_listen_writes_what_a_pipe_says(
    model: ScriptedModel, talk: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = [" ".join(NUMBERS[:4]), " ".join(NUMBERS[:3])]
    monkeypatch.setattr(listen_command, "read_input", reader(pcm(talk)))
    result = af3("listen", "-", "-o", tmp_path / "live.txt")
    assert (result.exit_code, result.stdout) == (0, "\n".join(lines) + "\n")
    assert (tmp_path / "live.txt").read_text() == result.stdout
    monkeypatch.setattr(listen_command, "read_input", reader(pcm(talk)))
    result = af3("listen", "-", "-f", "JSON", "-o", tmp_path / "live.json")
    assert [segment["text"] for segment in json.loads(result.stdout)["segments"]] == lines
    assert json.loads((tmp_path / "live.json").read_text())["text"] == " ".join(lines)


def test_listen_refuses_what_it_cannot_hear(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen_command, "read_input", reader(b"RIFF\0\0\0\0WAVEfmt "))
    result = af3("listen", "-")
    assert result.exit_code == 1
    assert "raw samples" in result.stderr
    assert af3("listen", "talk.wav").exit_code == 2
    assert "not one of txt" in af3("listen", "-", "-f", "doc").stderr
    monkeypatch.setattr("audioflamingo.cli.live_sound.require", _absent)
    result = af3("listen")
    assert result.exit_code == 1
    assert "audioflamingo[microphone]" in result.stderr


def _absent(module: str, extra: str) -> Any:
    raise MissingDependencyError(f"this needs the package {module}: pip install 'audioflamingo[{extra}]'")


class FakeSoundDevice:
    """What `sounddevice` offers of one microphone at 44.1 kHz: a talk comes through it, and then a Ctrl-C."""

    PortAudioError = type("PortAudioError", (Exception,), {})
    devices = (
        {"name": "Speakers", "max_input_channels": 0, "default_samplerate": 48000.0},
        {"name": "Desk microphone", "max_input_channels": 1, "default_samplerate": 44100.0},
    )

    def __init__(self, talk: np.ndarray) -> None:
        self.data = pcm(soxr.resample(talk, 16000, 44100))
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: int | str | None = None, kind: str | None = None) -> Any:
        if kind is None:
            return self.devices
        if device in (None, 1, "Desk"):
            return self.devices[1]
        raise ValueError(f"no input device matching {device!r}")

    def RawInputStream(self, *, callback: Callable[..., None], **options: Any) -> FakeSoundDevice:  # noqa: N802
        self.opened, self.callback = options, callback
        return self

    def start(self) -> None:
        self.handler = signal.getsignal(signal.SIGINT)
        threading.Thread(target=self._speak).start()

    def _speak(self) -> None:
        num_bytes = 2 * self.opened["blocksize"]
        for start in range(0, len(self.data), num_bytes):
            self.callback(memoryview(self.data)[start : start + num_bytes], None, None, None)
        while signal.getsignal(signal.SIGINT) is self.handler:  # it listens before it takes signals
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        while "is_closed" not in self.opened:  # a microphone never falls silent
            self.callback(bytes(num_bytes), None, None, None)
            time.sleep(0.1)

    def close(self) -> None:
        self.opened["is_closed"] = True


def test_a_microphone_is_heard_until_ctrl_c(
    model: ScriptedModel, talk: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [" ".join(NUMBERS[:4]), " ".join(NUMBERS[:3])]
    for choice, device in (((), None), (("--microphone", "1"), 1), (("--microphone", "Desk"), "Desk")):
        fake = FakeSoundDevice(talk)
        monkeypatch.setitem(sys.modules, "sounddevice", fake)
        result = af3("listen", *choice)
        assert (result.exit_code, result.stdout) == (0, "\n".join(lines) + "\n")
        assert "listening to Desk microphone; Ctrl-C ends." in result.stderr
        assert fake.opened == {
            "samplerate": 44100.0,
            "blocksize": 4410,
            "device": device,
            "channels": 1,
            "dtype": "int16",
            "is_closed": True,
        }


def test_a_microphone_that_is_not_there(
    model: ScriptedModel, talk: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice(talk))
    result = af3("listen", "--microphone", "Studio")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "no input device matching 'Studio'); this machine has Desk microphone." in result.stderr


def test_ctrl_c_writes_the_last_words(tmp_path: Path, talk: np.ndarray) -> None:
    """A process of its own, spoken to through a pipe that stays open."""
    folder = write_tiny_model(tmp_path / "model")
    process = af3_process("listen", "-", "-m", folder, "-f", "jsonl", "--max-new-tokens", "4")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(pcm(talk[: 16000 * 7]))  # the first speech ends
    process.stdin.flush()
    first = json.loads(process.stdout.readline())
    process.stdin.write(pcm(talk[16000 * 7 : 16000 * 9]))  # the second does not
    process.stdin.flush()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    later = [json.loads(line) for line in rest.splitlines()]  # the tiny model's answers are mended in halves
    assert first["start_s"] == pytest.approx(1.0, abs=0.3)
    assert later[-1]["end_s"] == pytest.approx(9.0, abs=0.3)
    assert any(segment["start_s"] == pytest.approx(7.0, abs=0.3) for segment in later)
