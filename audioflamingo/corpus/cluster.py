"""The connection to a Ray cluster, and how many workers have room on it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from audioflamingo.errors import ArgumentError, ClusterError, require
from audioflamingo.fields import check_fields, option

LOCAL = "local"  # Ray's words for a cluster of this machine alone, and for one that runs on it already
AUTO = "auto"
CONNECT_TIMEOUT_S = 5.0
EXTRA = "ray"  # what installs Ray; every node needs it

# A gRPC server, as Ray's head is one, answers these with a frame of settings (RFC 9113, 3.4 and 6.5).
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4
_RAY = "Ray"


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster works, with what, and in which pieces."""

    address: str = option(
        LOCAL,
        "Head of the cluster; auto: the one that runs on this machine; local: start one here for this command.",
        envvar="RAY_ADDRESS",
        metavar="HOST:PORT|auto|local",
        group=_RAY,
    )
    num_workers: int | None = option(
        None,
        "Workers, each with a model; by default one for each GPU, without GPUs one for each node.",
        at_least=1,
        group=_RAY,
    )
    cpus_per_worker: float | None = option(
        None, "By default 1 beside a GPU, otherwise all of its node.", at_least=0.1, group=_RAY
    )
    gpus_per_worker: float | None = option(
        None, "By default 1 if the cluster has GPUs.", at_least=0.0, group=_RAY
    )
    shard_size: int = option(
        16,
        "Files that a worker transcribes together, and that are done again if it dies meanwhile.",
        at_least=1,
        group=_RAY,
    )

    def __post_init__(self) -> None:
        check_fields(self)


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to a cluster and parts from it at the end; a connection that is there already is used as it is.

    Args:
        address: `"host:port"` of a cluster's head, `"auto"` for one that runs on this machine, or `"local"` to
            start one of this machine alone for as long as the connection lasts.

    Raises:
        ClusterError: nobody answers, or it is another version of Ray or Python.
        MissingDependencyError: Ray is not installed.
    """
    ray = require("ray", EXTRA)
    if ray.is_initialized():
        yield
        return
    # On standard error it would say at every start that actors can be lost together with their node.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    local_options: dict[str, Any] = {}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers about this machine
        local_options = {"include_dashboard": False}
    elif address != AUTO:
        check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local_options)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())
        raise ClusterError(f"cannot connect to a Ray cluster at {address!r}: {text}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Makes sure that a head may be at `address`: Ray itself waits for more than a minute, then exits.

    Raises:
        ClusterError: nobody is there, or somebody who is not Ray.
        ArgumentError: it is not of the form `host:port`.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ArgumentError(
            f"the address of a cluster must be host:port of its head, {AUTO!r} or {LOCAL!r}, got {address!r}. Run "
            "the command on a node of the cluster."
        )
    advice = "Is the cluster up (`ray status` on its head), and is this the port that `ray start --head` has shown?"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
                connection.sendall(_HTTP2_HELLO)
                answer = connection.recv(9)
                if len(answer) < 4 or answer[3] != _SETTINGS:
                    raise ClusterError(
                        f"what answers at {address} is not the head of a Ray cluster. {advice}"
                    )
    except (OSError, OverflowError) as error:
        text = str(error) or type(error).__name__
        raise ClusterError(f"no Ray cluster answers at {address}: {text}. {advice}") from error


@dataclass(frozen=True)
class WorkerPlan:
    """Workers and what each takes.

    Attributes:
        num_workers: each holds one model.
        cpus, gpus: of each; a part of a GPU is a number below 1.
    """

    num_workers: int
    cpus: float
    gpus: float


def plan_workers(
    nodes: Sequence[dict[str, float]],
    num_workers: int | None = None,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
) -> WorkerPlan:
    """Fits workers to a cluster: by default one for each GPU, or without GPUs one for each node with all its CPUs.

    Args:
        nodes: resources of each, with the keys `"CPU"` and `"GPU"`.
        num_workers: how many are asked for; None leaves it open.
        cpus_per_worker: of each; None leaves it open.
        gpus_per_worker: likewise; a part of one is a number below 1.

    Raises:
        ArgumentError: there is no room for that.
    """
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    if cpus_per_worker is None:
        cpus_per_worker = 1.0 if gpus_per_worker else _cpu_share(nodes, num_workers)
    room = sum(_room(node, cpus_per_worker, gpus_per_worker) for node in nodes)
    if room < (num_workers or 1):
        raise ArgumentError(
            f"the cluster has room for {room} workers with {cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs "
            f"each, {num_workers or 1} asked for. Change --num-workers, --cpus-per-worker or --gpus-per-worker."
        )
    return WorkerPlan(num_workers or room, cpus_per_worker, gpus_per_worker)


def _cpu_share(nodes: Sequence[dict[str, float]], num_workers: int | None) -> float:
    """The most CPUs that each worker can have: of all CPUs its share, of its node no more than that has."""
    counts = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    if not counts:
        return 1.0
    share = min(min(counts), sum(counts) // (num_workers or len(counts)))
    while share > 1 and sum(count // share for count in counts) < (num_workers or 1):
        share -= 1
    return max(1.0, share)


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Workers that one node takes."""
    wanted = {"CPU": cpus, "GPU": gpus}
    return int(min(node.get(name, 0.0) // amount for name, amount in wanted.items() if amount))


def alive_nodes() -> list[dict[str, float]]:
    """Resources of the nodes of the cluster that we are connected to."""
    return [dict(node["Resources"]) for node in require("ray", EXTRA).nodes() if node["Alive"]]
