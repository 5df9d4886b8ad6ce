"""Addresses that nobody answers at, and how many workers have room."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from audioflamingo.corpus import cluster
from audioflamingo.corpus.cluster import WorkerPlan, check_answers, plan_workers
from audioflamingo.errors import ArgumentError, ClusterError, MissingDependencyError
from tests.support.cli_runs import af3

DATA = Path(__file__).parents[2] / "data"
CPU_NODES = [{"CPU": 8.0}, {"CPU": 4.0}, {}]
GPU_NODES = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0}]


@pytest.mark.parametrize(
    ("nodes", "asked", "plan"),
    [
        (CPU_NODES, (None, None, None), WorkerPlan(3, 4, 0)),
        (CPU_NODES, (4, None, None), WorkerPlan(4, 2, 0)),
        (CPU_NODES, (None, 8, None), WorkerPlan(1, 8, 0)),
        (GPU_NODES, (None, None, None), WorkerPlan(4, 1, 1)),
        (GPU_NODES, (3, 2, 0.5), WorkerPlan(3, 2, 0.5)),
        (GPU_NODES, (None, None, 0), WorkerPlan(2, 16, 0)),
    ],
)
def test_workers_fit_the_cluster(
    nodes: list[dict[str, float]], asked: tuple[int | None, float | None, float | None], plan: WorkerPlan
) -> None:
    assert plan_workers(nodes, *asked) == plan


@pytest.mark.parametrize(
    ("nodes", "asked"), [(CPU_NODES, (4, 4, 0)), (CPU_NODES, (None, None, 1)), ([], (None, None, None))]
)
def test_there_is_no_room(
    nodes: list[dict[str, float]], asked: tuple[int | None, float | None, float | None]
) -> None:
    with pytest.raises(ArgumentError, match="the cluster has room for"):
        plan_workers(nodes, *asked)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_nobody_answers(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 0.2)
    port = listener.getsockname()[1]
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at 127.0.0.1:{port}: timed out"):
        check_answers(f"127.0.0.1:{port}")
    listener.close()
    with pytest.raises(ClusterError, match="Connection refused"):
        check_answers(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["somewhere", "ray://10.0.0.1:10001", "10.0.0.1:", ":1", "a:b"])
def test_an_address_of_another_form(address: str) -> None:
    with pytest.raises(ArgumentError, match="must be host:port"):
        check_answers(address)


def test_the_command_says_that_nobody_answers(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs ray[data]")
    monkeypatch.setattr("audioflamingo.cli.cluster_job._describe", lambda *_: {})
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    arguments = [DATA / "directory_prompt.flac", "-o", tmp_path / "out", "--engine", "ray"]
    result = af3("transcribe", *arguments, "--address", address)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"error: no Ray cluster answers at {address}: ")


def test_without_ray_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingDependencyError, match=r"pip install 'audioflamingo\[ray\]'"),
        cluster.connected("auto"),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "--engine", "ray"], "needs a folder"),
        (["a.wav", "--engine", "ray", "-o", "out", "--format", "srt"], "writes jsonl"),
        (["-", "--engine", "ray", "-o", "out"], "standard input"),
        (["a.wav", "--num-workers", "2"], "needs --engine ray"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str) -> None:
    result = af3("transcribe", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_argument_without_audio_starts_nothing(tmp_path: Path) -> None:
    result = af3("transcribe", tmp_path, "--engine", "ray", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "no audio files in this folder" in result.stderr
    assert not (tmp_path / "out").exists()
