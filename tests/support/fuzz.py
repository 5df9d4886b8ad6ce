"""Sends mutated audio files and request bodies to a server: it must answer each with sense, and go on.

python -m tests.support.fuzz --count 2000     # of each kind, against the built-in model
python -m tests.support.fuzz --count 2000 --decode-only     # mutated files of every container, decoded here
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np

from audioflamingo.audio import load_audio
from audioflamingo.errors import AudioError
from tests.support.audio_files import KINDS, encode, tone
from tests.support.recordings import Track, record
from tests.support.server_runs import audio_part, chat_body, running_server

GOOD_STATUS = (200, 400, 404, 408, 413)
TIMEOUT_S = 120
JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**63, -(2**70), 1e308, 0.5, "", "x", "\x00", "\ud800", "é" * 300, "<sound>"),
    *(
        [],
        {},
        [[]],
        [None],
        {"": ""},
        {"type": "text"},
        {"type": "input_audio"},
        "data:,",
        "http://127.0.0.1/",
        "1e999",
    ),
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Changes, cuts, repeats, inserts or zeroes some bytes."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not mutated:
            break
        at = rng.randrange(min(len(mutated), rng.choice((64, 4096, len(mutated)))))
        size = rng.choice((1, 2, 4, 16, 500))
        kind = rng.randrange(7)
        if kind == 0:
            mutated[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del mutated[at:]
        elif kind == 3:
            del mutated[at : at + size]
        elif kind == 4:
            mutated[at:at] = rng.randbytes(size)
        elif kind == 5:
            mutated[at:at] = mutated[at : at + 20 * size]
        else:
            mutated[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f")) * size
    return bytes(mutated)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Replaces, drops, repeats or wraps something within a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        copy, name = dict(value), rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            del copy[name]
        elif kind == 1:
            copy[rng.choice(("", name + "s", "n", "stop", "tools", "x" * 500))] = rng.choice(JUNK)
        else:
            copy[name] = mutate_json(value[name], rng)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.85:
        items, at = list(value), rng.randrange(len(value))
        kind = rng.randrange(6)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items = items * rng.choice((2, 50))
        else:
            items[at] = mutate_json(items[at], rng)
        return items
    return rng.choice((*JUNK, [value], {"a": value}))


def audio_files(rng: random.Random) -> list[bytes]:
    """One short file of each kind."""
    return [encode(tone(0.5, 16000, 1, noise=0.01), 16000, kind) for kind in KINDS if kind != "opus"] + [
        encode(tone(0.5, 48000), 48000, "opus")
    ]


FURTHER_KINDS = (  # container, codec, rate
    *(("matroska", "aac", 48000), ("matroska", "pcm_s16le", 48000), ("mov", "pcm_s16le", 48000)),
    *(("mpegts", "aac", 44100), ("mpeg", "mp2", 48000), ("avi", "libmp3lame", 44100), ("flv", "aac", 44100)),
    *(("asf", "wmav2", 44100), ("au", "pcm_mulaw", 8000), ("voc", "pcm_u8", 16000), ("wv", "wavpack", 16000)),
    *(("tta", "tta", 16000), ("ac3", "ac3", 48000), ("eac3", "eac3", 48000), ("caf", "alac", 16000)),
)
CLIP_S = 1.0
SHORT_S = 0.05  # what comes ahead of the sound
LONGEST_S = 100.0  # a changed time stamp may well say half a minute of silence


def decode(count: int, seed: int) -> dict[str, int]:
    """Decodes `count` mutated files of every container: each is refused, or heard without nonsense.

    Returns:
        How many were refused, heard with a warning, and heard without one.
    """
    rng = random.Random(seed)
    files = [encode(tone(CLIP_S, 48000, noise=0.01), 48000, kind) for kind in KINDS]
    files += [record(*kind, Track(duration_s=CLIP_S)) for kind in FURTHER_KINDS]
    files += [
        record(*kind, Track(duration_s=CLIP_S, start_s=0.5), has_picture=True) for kind in FURTHER_KINDS[:5]
    ]
    counts: collections.Counter[str] = collections.Counter()
    for number in range(count):
        data = mutate_bytes(rng.choice(files), rng)
        if rng.random() < 0.1:
            data += rng.choice(files)[rng.choice((0, 0, rng.randrange(200))) :]
        counts[_decode_one(data, number % 3 == 0, number)] += 1
    return dict(counts)


def _decode_one(data: bytes, allow_damaged: bool, number: int) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            waveform = load_audio(data, allow_damaged=allow_damaged)
        except AudioError:
            return "refused"
    assert np.isfinite(waveform).all(), number
    assert len(waveform) < LONGEST_S * 16000, (number, len(waveform))
    assert caught or len(waveform) < SHORT_S * 16000 or np.abs(waveform).max() > 0.01, number
    return "warned" if caught else "heard"


def audio_requests(
    client: httpx.Client, model: str, count: int, rng: random.Random
) -> Iterator[httpx.Response]:
    """Mutated files, as transcriptions and as parts of chats."""
    files = audio_files(rng)
    for number in range(count):
        data = mutate_bytes(rng.choice(files), rng)
        if rng.random() < 0.1:
            data = data[: len(data) // 2] + rng.choice(files)[rng.randrange(200) :]
        if number % 2:
            body = {**chat_body("what", audio_part(data)), "model": model, "max_tokens": 2}
            yield client.post("/v1/chat/completions", json=body)
        else:
            form = {"model": model, "stream": rng.choice(("true", "false"))}
            yield client.post("/v1/audio/transcriptions", files={"file": data}, data=form)


def body_requests(
    client: httpx.Client, model: str, count: int, rng: random.Random
) -> Iterator[httpx.Response]:
    """Mutated bodies: JSON values, JSON text, and forms."""
    clip = encode(tone(0.3), 16000, "flac")
    good = {
        **chat_body(
            "what", audio_part(clip), temperature=0.7, top_p=0.9, seed=1, stop=["."], logprobs=True, n=2
        ),
        **{"model": model, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    }
    form = client.build_request(
        "POST", "/v1/audio/transcriptions", files={"file": clip}, data={"model": model, "language": "en"}
    )
    form_body = form.read()
    for number in range(count):
        if number % 3 == 0:
            value = good
            for _ in range(rng.choice((1, 1, 2, 4))):
                value = mutate_json(value, rng)
            if (
                isinstance(value, dict)
                and isinstance(value.get("max_tokens"), int)
                and value["max_tokens"] > 50
            ):
                value["max_tokens"] = 50
            content, headers = json.dumps(value).encode(), {"content-type": "application/json"}
            path = "/v1/chat/completions"
        elif number % 3 == 1:
            content = mutate_bytes(json.dumps(good).encode(), rng)
            headers, path = {"content-type": "application/json"}, "/v1/chat/completions"
        else:
            content = mutate_bytes(form_body, rng)
            headers, path = {"content-type": form.headers["content-type"]}, "/v1/audio/transcriptions"
        yield client.post(path, content=content, headers=headers)


def check(replies: Iterator[httpx.Response]) -> collections.Counter[int]:
    """Counts replies by status; a reply that makes no sense fails."""
    counts: collections.Counter[int] = collections.Counter()
    for number, reply in enumerate(replies):
        counts[reply.status_code] += 1
        assert reply.status_code in GOOD_STATUS, (number, reply.status_code, reply.text[:500])
        if reply.status_code != 200:
            assert reply.json()["error"]["message"], (number, reply.text[:500])
        elif reply.headers["content-type"].startswith("text/event-stream"):
            assert '"internal_error"' not in reply.text, (number, reply.text[-500:])
    return counts


def fuzz(client: httpx.Client, model: str, count: int, seed: int) -> dict[str, dict[int, int]]:
    """Sends `count` requests of each kind, then a good one. Returns the number of replies by status."""
    rng = random.Random(seed)
    counts = {
        "audio": dict(check(audio_requests(client, model, count, rng))),
        "bodies": dict(check(body_requests(client, model, count, rng))),
    }
    body = {**chat_body("hello", audio_part(encode(tone(), 16000, "wav"))), "model": model}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert client.get("/health").status_code == 200
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="requests of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.decode_only:
        print(json.dumps({"seed": arguments.seed, **decode(arguments.count, arguments.seed)}))
        return
    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano")
    processor = AutoProcessor.from_pretrained("nano")
    with (
        running_server(model, processor, served_model_name="nano") as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        print(json.dumps({"seed": arguments.seed, **fuzz(client, "nano", arguments.count, arguments.seed)}))
    sys.exit(0)


if __name__ == "__main__":
    main()
