"""What the server costs and what batching gains, on the built-in model or any other.

- tokens/s of 8 chats at once beside one chat alone;
- time to the first token of a short request beside a running 10-minute transcription, and alone;
- what the server adds to the library for one transcription.

    python benchmarks/server.py                       # the built-in model
    python benchmarks/server.py --model FOLDER --quantization int4 --only chats

Rounds are interleaved and medians are shown; prompts differ from one another, so nothing is found in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np

ROOT = Path(__file__).parents[1]
SPEECH = ROOT / "tests" / "data" / "directory_prompt.flac"
SAMPLING_RATE = 16000
TIMEOUT_S = 3600
WORDS = (
    "river",
    "stone",
    "cloud",
    "music",
    "seven",
    "garden",
    "window",
    "letter",
    "market",
    "silver",
    "winter",
)

_rng = random.Random(0)
_numbers = itertools.count()


class ServerProcess:
    """`af3 serve` as a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "audioflamingo.cli",
            "serve",
            "--model",
            model,
            "--port",
            "0",
            *options,
        ]
        self._process = subprocess.Popen(
            [*command, "--served-model-name", "model", "--log-level", "info"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self.log: list[bytes] = []
        addresses: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read_log, args=(addresses,), daemon=True).start()
        url = addresses.get(timeout=TIMEOUT_S)
        if url is None:
            raise RuntimeError(f"the server did not start: {b''.join(self.log).decode()}")
        self.url = url

    def _read_log(self, addresses: queue.Queue[str | None]) -> None:
        """Keeps every line; hands over the address once it is known, or None when the server has ended."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            if found := re.search(rb'"address": "([^"]+)"', line):
                addresses.put(found[1].decode())
        addresses.put(None)

    def stop(self) -> None:
        """Ends it in good order."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)


def unique_text() -> str:
    """A question that was not asked before."""
    return f"Number {next(_numbers)}: " + " ".join(_rng.choices(WORDS, k=12)) + "?"


def wav_bytes(waveform: np.ndarray) -> bytes:
    """A 16-bit WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def speech(duration_s: float) -> bytes:
    """A recording of speech, again and again, with a little noise that is never the same."""
    from audioflamingo import load_audio

    once = np.pad(load_audio(SPEECH), (0, SAMPLING_RATE))
    waveform = np.resize(once, round(duration_s * SAMPLING_RATE))
    noise = np.random.default_rng(next(_numbers)).standard_normal(len(waveform)) * 1e-3
    return wav_bytes(waveform + noise)


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    """A chat request."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def clip(data: bytes) -> dict[str, Any]:
    """A clip as a part of a chat."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """Sends a chat; returns the tokens of its answer."""
    reply = await client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    return reply.json()["usage"]["completion_tokens"]


async def first_token_s(client: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Seconds until the first text of a streamed chat."""
    start = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - start
    raise RuntimeError("no token came")


async def tokens_per_s(client: httpx.AsyncClient, num_chats: int, num_tokens: int) -> float:
    """All tokens of some chats at once, by the time that they take."""
    bodies = [chat(unique_text(), max_tokens=num_tokens, min_tokens=num_tokens) for _ in range(num_chats)]
    start = time.perf_counter()
    counts = await asyncio.gather(*(ask(client, body) for body in bodies))
    return sum(counts) / (time.perf_counter() - start)


async def measure_chats(client: httpx.AsyncClient, rounds: int, num_tokens: int) -> dict[str, Any]:
    """One chat and eight, in turns."""
    one, eight = [], []
    for _ in range(rounds + 1):
        one.append(await tokens_per_s(client, 1, num_tokens))
        eight.append(await tokens_per_s(client, 8, num_tokens))
    one, eight = one[1:], eight[1:]  # the first round warms up
    ratios = [many / single for single, many in zip(one, eight, strict=True)]
    return {
        "one_chat_tokens_per_s": round(statistics.median(one), 1),
        "eight_chats_tokens_per_s": round(statistics.median(eight), 1),
        "ratio": round(statistics.median(ratios), 2),
    }


async def measure_first_token(
    client: httpx.AsyncClient, rounds: int, long_s: float, short_s: float
) -> dict[str, Any]:
    """A short request alone and beside a long transcription, in turns."""

    def short() -> dict[str, Any]:
        parts = [clip(speech(short_s))] if short_s else []
        return chat(*parts, unique_text(), max_tokens=8)

    await first_token_s(client, short())
    alone: list[float] = []
    beside: list[float] = []
    long_times: list[float] = []
    while len(beside) < rounds:
        alone += [await first_token_s(client, short()) for _ in range(3)]
        start = time.perf_counter()
        form = {"model": "model", "stream": "true"}
        long = asyncio.create_task(
            client.post("/v1/audio/transcriptions", files={"file": speech(long_s)}, data=form)
        )
        await asyncio.sleep(1.0)
        while not long.done() and len(beside) < rounds:
            time_s = await first_token_s(client, short())
            if not long.done():
                beside.append(time_s)
            await asyncio.sleep(_rng.uniform(0.05, 0.3))
        (await long).raise_for_status()
        long_times.append(time.perf_counter() - start)
    return {
        "alone_ms": round(statistics.median(alone) * 1000, 1),
        "beside_ms": round(statistics.median(beside) * 1000, 1),
        "beside_p90_ms": round(sorted(beside)[int(len(beside) * 0.9)] * 1000, 1),
        "ratio": round(statistics.median(beside) / statistics.median(alone), 2),
        "requests_beside": len(beside),
        "long_transcription_s": round(statistics.median(long_times), 1),
    }


def measure_overhead(model_name: str, rounds: int) -> dict[str, Any]:
    """One transcription through the server and through the library, in turns, in one process with one model."""
    sys.path.insert(0, str(ROOT))
    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
    from audioflamingo.transcription import transcribe
    from tests.support.server_runs import running_server

    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(model_name, dtype="float32")
    processor = AutoProcessor.from_pretrained(model_name)
    library, server_s = [], []
    with (
        running_server(model, processor, served_model_name="model", cache_tokens=4000) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        for _ in range(rounds + 1):
            data = speech(12)
            start = time.perf_counter()
            expected = " ".join(
                " ".join(s.text.split()) for s in transcribe(model, processor, data) if s.text
            )
            library.append(time.perf_counter() - start)
            start = time.perf_counter()
            reply = client.post("/v1/audio/transcriptions", files={"file": data}, data={"model": "model"})
            server_s.append(time.perf_counter() - start)
            assert reply.json()["text"] == expected
    added = [(s - own) * 1000 for s, own in zip(server_s[1:], library[1:], strict=True)]
    return {
        "library_ms": round(statistics.median(library[1:]) * 1000, 1),
        "server_ms": round(statistics.median(server_s[1:]) * 1000, 1),
        "added_ms": round(statistics.median(added), 1),
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements that were asked for."""
    wanted = arguments.only or ["chats", "first-token", "overhead"]
    results: dict[str, Any] = {}
    if "overhead" in wanted:
        results["overhead"] = await asyncio.to_thread(measure_overhead, arguments.model, arguments.rounds)
    if set(wanted) == {"overhead"}:
        return results
    options = ["--quantization", arguments.quantization] if arguments.quantization else []
    server = ServerProcess(arguments.model, *options)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
            if "chats" in wanted:
                results["chats"] = await measure_chats(client, arguments.rounds, arguments.tokens)
            if "first-token" in wanted:
                results["first_token_text"] = await measure_first_token(
                    client, 4 * arguments.rounds, arguments.long_seconds, 0
                )
                results["first_token_3_s_clip"] = await measure_first_token(
                    client, 4 * arguments.rounds, arguments.long_seconds, 3
                )
    finally:
        server.stop()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--quantization")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="length of the chats' answers")
    parser.add_argument("--long-seconds", type=float, default=600, help="length of the long transcription")
    parser.add_argument("--only", action="append", choices=("chats", "first-token", "overhead"))
    results = asyncio.run(run(parser.parse_args()))
    for name, result in results.items():
        print(f"{name:22} " + "  ".join(f"{key} {value}" for key, value in result.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
