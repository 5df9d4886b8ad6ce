"""Thousands of mixed requests, some hanging up, some of them bad: is every answer right, is nothing lost?

    python benchmarks/soak.py                             # 2,000 requests, 32 at a time, the built-in model
    python benchmarks/soak.py --requests 200 --concurrency 16

First each kind of request is answered alone; in the soak its answer must be the same. Memory, threads and open files
of the server are those of its process (Linux), after the first 200 requests and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from server import TIMEOUT_S, ServerProcess, chat, clip, speech, unique_text

HANG_UPS, BAD = 0.05, 0.05
WARM_UP = 200
IDLE_S = 3  # before the process is looked at, both times: an idle server gives memory back


@dataclass
class Kind:
    """A request that is sent many times.

    Attributes:
        path: where to.
        json, data, file: its body.
        expected: its answer when it was alone.
    """

    path: str
    json: dict[str, Any] | None = None
    data: dict[str, str] | None = None
    file: bytes | None = None
    expected: Any = None

    def arguments(self) -> dict[str, Any]:
        """Keywords of the client's `post`."""
        if self.json is not None:
            return {"json": self.json}
        return {"data": self.data, "files": {"file": ("clip.wav", self.file)}}


def kinds(count: int, rng: random.Random) -> list[Kind]:
    """Chats with and without clips, short and long, greedy and drawn, whole and streamed; transcriptions."""
    clips = [speech(rng.uniform(0.5, 6)) for _ in range(8)]
    found = []
    for _ in range(count):
        draw = rng.random()
        if draw < 0.15:
            data = {"model": "model", "stream": rng.choice(("true", "false"))}
            found.append(Kind("/v1/audio/transcriptions", data=data, file=rng.choice(clips)))
            continue
        parts: list[Any] = [clip(rng.choice(clips)) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
        body = chat(*parts, unique_text() * rng.choice((1, 1, 5)), max_tokens=rng.randint(1, 48))
        if rng.random() < 0.5:
            body |= {
                "temperature": rng.uniform(0.3, 1.2),
                "top_p": rng.uniform(0.5, 1),
                "seed": rng.randrange(2**40),
            }
        if rng.random() < 0.3:
            body["stream"] = True
        if rng.random() < 0.1 and not body.get("stream"):
            body |= {"n": 2, "seed": 5, "temperature": 1.0}
        if rng.random() < 0.1:
            body["stop"] = ["e", "the"]
        found.append(Kind("/v1/chat/completions", json=body))
    return found


def bad_requests(rng: random.Random) -> list[tuple[Kind, tuple[int, ...]]]:
    """Requests with the status that they deserve."""
    return [
        (Kind("/v1/chat/completions", json=chat("x") | {"model": "gpt"}), (404,)),
        (Kind("/v1/chat/completions", json=chat("x", temperature=-1)), (400,)),
        (Kind("/v1/chat/completions", json=chat(clip(b"no audio"), "x")), (400,)),
        (Kind("/v1/chat/completions", json=chat("the " * 40000)), (400,)),
        (Kind("/v1/audio/transcriptions", data={"model": "model"}, file=rng.randbytes(5000)), (400,)),
        (Kind("/v1/audio/transcriptions", data={"model": "model"}, file=bytes(30_000_000)), (413,)),
    ]


def answer_of(reply: httpx.Response) -> Any:
    """What a reply says, without its id and time, whether it was streamed or not."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        content = reply.json()
        if "text" in content:
            return content["text"]
        return [(choice["message"]["content"], choice["finish_reason"]) for choice in content["choices"]]
    lines = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", reply.text[-300:]
    events = [json.loads(line) for line in lines[:-1]]
    assert not any("error" in event for event in events), events
    if "type" in events[-1]:
        return events[-1]["text"]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    return [(text, events[-1]["choices"][0]["finish_reason"])]


class Soak:
    """The run, and what it counts."""

    def __init__(self, client: httpx.AsyncClient, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    async def send(self, kind: Kind) -> httpx.Response:
        """Sends a request, again where the server is busy."""
        while True:
            reply = await self._client.post(kind.path, **kind.arguments())
            if reply.status_code != 429:
                return reply
            self.counts["429, sent again"] += 1
            await asyncio.sleep(float(reply.headers["retry-after"]) * self._rng.uniform(0.5, 1.5))

    async def good(self, kind: Kind) -> None:
        """A request that must be answered as it was alone."""
        reply = await self.send(kind)
        self.counts[f"good, {reply.status_code}"] += 1
        if reply.status_code != 200:
            self.wrong.append(f"{reply.status_code} {reply.text[:200]}")
        elif (answer := answer_of(reply)) != kind.expected:
            self.wrong.append(f"{answer!r} in place of {kind.expected!r}")

    async def bad(self, kind: Kind, statuses: tuple[int, ...]) -> None:
        """A request that must be refused."""
        reply = await self.send(kind)
        self.counts[f"bad, {reply.status_code}"] += 1
        if reply.status_code not in statuses or not reply.json()["error"]["message"]:
            self.wrong.append(f"{reply.status_code} in place of {statuses}: {reply.text[:200]}")

    async def hang_up(self, kind: Kind) -> None:
        """A client that goes before it has its answer."""
        task = asyncio.create_task(self._client.post(kind.path, **kind.arguments()))
        await asyncio.wait({task}, timeout=self._rng.uniform(0, 0.3))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.counts["hung up"] += 1


def process_state(pid: int) -> dict[str, int]:
    """Memory in bytes, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return {
        "memory_bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "threads": int(fields["Threads"]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


async def idle_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics, once it has nothing to do."""
    end = time.monotonic() + 60
    while True:
        text = (await client.get("/metrics")).text
        values = {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line[0] != "#"
        }
        names = ("af3_requests_running", "af3_requests_waiting", 'af3_cache_tokens{use="running"}')
        left = {name: values[name] for name in names}
        if not any(left.values()) or time.monotonic() > end:
            return left
        await asyncio.sleep(0.1)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    rng = random.Random(arguments.seed)
    server = ServerProcess(arguments.model, "--cache-tokens", str(arguments.cache_tokens))
    limits = httpx.Limits(
        max_connections=arguments.concurrency, max_keepalive_connections=arguments.concurrency
    )
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=limits) as client:
            soak = Soak(client, rng)
            requests = kinds(arguments.kinds, rng)
            for kind in requests:
                kind.expected = answer_of(await soak.send(kind))
            bad = bad_requests(rng)
            states: list[dict[str, int]] = []

            async def worker(todo: Iterator[int]) -> None:
                for _ in todo:
                    draw = rng.random()
                    if draw < HANG_UPS:
                        await soak.hang_up(rng.choice(requests))
                    elif draw < HANG_UPS + BAD:
                        await soak.bad(*rng.choice(bad))
                    else:
                        await soak.good(rng.choice(requests))

            duration_s = 0.0
            num_first = min(WARM_UP, arguments.requests // 2)
            for count in (num_first, arguments.requests - num_first):
                todo = iter(range(count))
                start = time.perf_counter()
                await asyncio.gather(*(worker(todo) for _ in range(arguments.concurrency)))
                duration_s += time.perf_counter() - start
                left = await idle_metrics(client)
                await asyncio.sleep(IDLE_S)
                states.append(process_state(server.pid))
    finally:
        server.stop()
    first, last = states
    return {
        "requests": arguments.requests,
        "concurrency": arguments.concurrency,
        "requests_per_s": round(arguments.requests / duration_s, 2),
        "counts": dict(sorted(soak.counts.items())),
        "wrong": soak.wrong[:5],
        "num_wrong": len(soak.wrong),
        "memory_growth": round(last["memory_bytes"] / first["memory_bytes"] - 1, 4),
        "first": first,
        "last": last,
        "left": left,
        "tracebacks": sum(b'"traceback"' in line for line in server.log),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--kinds", type=int, default=60, help="different good requests")
    parser.add_argument("--cache-tokens", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    result = asyncio.run(run(parser.parse_args()))
    for name, value in result.items():
        print(f"{name:16} {value}")
    print(json.dumps(result))
    sys.exit(1 if result["num_wrong"] or result["tracebacks"] or any(result["left"].values()) else 0)


if __name__ == "__main__":
    main()
