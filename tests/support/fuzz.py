"""Mutated files and request bodies: each is refused in one line or taken with sense, soon, and the next one too.

    python -m tests.support.fuzz --count 2000

decodes and transcribes so many mutated files of every container, and sends the server so many files, and so many bodies
for each route that takes one. `--only` names some of the four; `--model` takes another than a tiny one.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np

from audioflamingo.audio import load_audio
from audioflamingo.errors import AudioError
from audioflamingo.transcription import transcribe
from tests.support.audio_files import KINDS, encode, tone
from tests.support.generation_models import lively_model
from tests.support.recordings import Track, record
from tests.support.scripted_model import ScriptedModel, framed, tiny_processor
from tests.support.server_runs import audio_part, chat_body, running_server

GOOD_STATUS = (200, 400, 404, 408, 413, 415)
LIMIT_S = 60  # for one input; a tenth of a second is usual
JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**63, -(2**70), 1e308, 0.5, "", "x", "\x00", "\ud800", "é" * 300, "<sound>"),
    *(float("nan"), float("inf"), 10**400, "1", "x" * 100_000, list(range(1000))),
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


@contextmanager
def limited(number: int) -> Iterator[None]:
    """Fails when one input takes too long."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"input {number} is not done after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated_files(count: int, seed: int) -> Iterator[bytes]:
    """Files of every container, changed; one of ten with a piece of another behind it."""
    rng = random.Random(seed)
    files = [encode(tone(CLIP_S, 48000, noise=0.01), 48000, kind) for kind in KINDS]
    files += [record(*kind, Track(duration_s=CLIP_S)) for kind in FURTHER_KINDS]
    files += [
        record(*kind, Track(duration_s=CLIP_S, start_s=0.5), has_picture=True) for kind in FURTHER_KINDS[:5]
    ]
    for _ in range(count):
        data = mutate_bytes(rng.choice(files), rng)
        if rng.random() < 0.1:
            data += rng.choice(files)[rng.choice((0, 0, rng.randrange(200))) :]
        yield data


def each_file(count: int, seed: int, hear: Callable[[bytes, bool, int], str]) -> dict[str, int]:
    """Does something with each mutated file; every third may be damaged. Counts what came of it."""
    counts: collections.Counter[str] = collections.Counter()
    for number, data in enumerate(mutated_files(count, seed)):
        with limited(number), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = hear(data, number % 3 == 0, number)
            except AudioError as error:
                result = "two lines" if "\n" in str(error) else "refused"
        assert result != "two lines", number
        assert caught or result != "silent", number
        counts["warned" if caught and result != "refused" else result] += 1
    return dict(counts)


def decode(count: int, seed: int) -> dict[str, int]:
    """Decodes `count` mutated files: each is refused, or heard without nonsense.

    Returns:
        How many were refused, heard with a warning, and heard without one.
    """

    def hear(data: bytes, allow_damaged: bool, number: int) -> str:
        waveform = load_audio(data, allow_damaged=allow_damaged)
        assert np.isfinite(waveform).all(), number
        assert len(waveform) < LONGEST_S * 16000, (number, len(waveform))
        return "heard" if len(waveform) < SHORT_S * 16000 or np.abs(waveform).max() > 0.01 else "silent"

    return each_file(count, seed, hear)


def transcripts(count: int, seed: int) -> dict[str, int]:
    """Transcribes `count` mutated files with a model that says the same of each window.

    Returns:
        How many were refused, heard with a warning, heard without one, and how many held no speech.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor = tiny_processor(Path(folder))
    model: Any = ScriptedModel(processor, lambda seconds, attempt: framed("hello world"))

    def hear(data: bytes, allow_damaged: bool, number: int) -> str:
        segments = list(
            transcribe(model, processor, data, allow_damaged=allow_damaged, use_vad=number % 2 == 0)
        )
        times = [time for segment in segments for time in (segment.start_s, segment.end_s)]
        assert times == sorted(times), (number, times)
        assert all(0 <= time < LONGEST_S for time in times), (number, times)
        assert {segment.text for segment in segments} <= {"hello world"}, (number, segments)
        return "heard" if segments else "no speech"

    return each_file(count, seed, hear)


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


def _bodies(model: str) -> dict[str, dict[str, Any]]:
    """A good JSON body for each route that takes one, with as many fields as it has."""
    part = audio_part(encode(tone(0.3), 16000, "flac"))
    chat = chat_body("what", part, temperature=0.7, top_p=0.9, seed=1, stop=["."], logprobs=True, n=2)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "what"}, part]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "why"},
    ]
    limits = {"temperature": 0.7, "top_p": 0.9, "seed": 1, "stream": True}
    responses = {"input": turns, "instructions": "hello", "text": {"format": {"type": "text"}}, **limits}
    return {
        "/v1/chat/completions": {**chat, **stream, "model": model, "max_tokens": 2},
        "/v1/responses": {**responses, "model": model, "max_output_tokens": 2},
    }


def _form(client: httpx.Client, path: str, model: str) -> tuple[bytes, str]:
    """A good form and its content type."""
    fields = {"model": model, "language": "en", "temperature": "0.2", "timestamp_granularities[]": "word"}
    form = client.build_request(
        "POST",
        path,
        files={"file": encode(tone(0.3), 16000, "flac")},
        data={**fields, "response_format": "verbose_json", "chunking_strategy": "auto"},
    )
    return form.read(), form.headers["content-type"]


def _few_tokens(value: Any) -> Any:
    """The same body for a short answer: how long one may be is not what is tried here."""
    for name in ("max_tokens", "max_output_tokens"):
        if isinstance(value, dict) and isinstance(value.get(name), int) and value[name] > 3:
            value = {**value, name: 3}
    return value


def _mutated_json(good: Any, rng: random.Random) -> tuple[bytes, str]:
    """A body with its content type, of which values, bytes, the depth or the encoding are not what they should be."""
    kind, content_type = rng.randrange(6), "application/json"
    if kind == 0:
        return mutate_bytes(json.dumps(good).encode(), rng), content_type
    value = good
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = mutate_json(value, rng)
    text = json.dumps(_few_tokens(value))
    if kind == 1:
        encoding = rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037"))
        return text.encode(encoding), rng.choice((content_type, "text/plain", "application/json; charset=x"))
    if kind == 2:
        depth = rng.choice((50, 500, 5000, 100_000))
        opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
        name = rng.choice(("messages", "input", "stop", "metadata", "tools"))
        closing = closed * rng.choice((0, 1, depth))
        return f'{text[:-1]}, "{name}": {opened * depth}1{closing}}}'.encode(), content_type
    return text.encode(), content_type


def body_requests(
    client: httpx.Client, model: str, count: int, rng: random.Random
) -> Iterator[tuple[str, httpx.Response]]:
    """`count` mutated bodies for each route that takes one."""
    bodies = _bodies(model)
    paths = ("/v1/audio/transcriptions", "/v1/audio/translations")
    forms = {path: _form(client, path, model) for path in paths}
    for path, good in bodies.items():
        assert client.post(path, json=good).status_code == 200, path
    for path, (body, kind) in forms.items():
        assert client.post(path, content=body, headers={"content-type": kind}).status_code == 200, path
    for _ in range(count):
        for path, good in bodies.items():
            content, kind = _mutated_json(good, rng)
            yield path, client.post(path, content=content, headers={"content-type": kind})
        for path, (body, kind) in forms.items():
            content = body[: rng.randrange(len(body))] if rng.random() < 0.2 else mutate_bytes(body, rng)
            if rng.random() < 0.1:
                changed = mutate_bytes(kind.encode(), rng).decode("latin-1")
                kind = "".join(character for character in changed if " " <= character <= "~").strip()
            yield path, client.post(path, content=content, headers={"content-type": kind})


def check(number: int, reply: httpx.Response) -> None:
    """A reply that makes no sense fails."""
    assert reply.status_code in GOOD_STATUS, (number, reply.status_code, reply.text[:500])
    if reply.status_code != 200:
        assert reply.json()["error"]["message"], (number, reply.text[:500])
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert '"internal_error"' not in reply.text, (number, reply.text[-500:])
        assert reply.text.endswith("\n\n"), (number, reply.text[-500:])


def fuzz_files(client: httpx.Client, model: str, count: int, seed: int) -> dict[int, int]:
    """Sends `count` mutated files. Returns the number of replies by status."""
    counts: collections.Counter[int] = collections.Counter()
    for number, reply in enumerate(audio_requests(client, model, count, random.Random(seed))):
        check(number, reply)
        counts[reply.status_code] += 1
    _check_health(client, model)
    return dict(counts)


def fuzz_bodies(client: httpx.Client, model: str, count: int, seed: int) -> dict[str, dict[int, int]]:
    """Sends `count` mutated bodies to each route. Returns the number of replies by route and status."""
    counts: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for number, (path, reply) in enumerate(body_requests(client, model, count, random.Random(seed))):
        check(number, reply)
        counts[path][reply.status_code] += 1
    _check_health(client, model)
    return {path: dict(found) for path, found in counts.items()}


def _check_health(client: httpx.Client, model: str) -> None:
    """The server answers a good request as before."""
    body = {**chat_body("hello", audio_part(encode(tone(), 16000, "wav"))), "model": model}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert client.get("/health").status_code == 200


def _load(name: str | None) -> tuple[Any, Any]:
    """A model by its name, or a tiny one."""
    if name is None:
        with tempfile.TemporaryDirectory() as folder:
            processor = tiny_processor(Path(folder))
        model = lively_model()
        model.generation_config.eos_token_id = [10, 11, 12, 497]
        return model, processor
    from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor

    return AudioFlamingo3ForConditionalGeneration.from_pretrained(name), AutoProcessor.from_pretrained(name)


def main() -> None:
    kinds = ("decode", "transcribe", "files", "bodies")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="inputs of each kind, and for each route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=kinds, nargs="+", default=kinds)
    parser.add_argument("--model", help="for the server, in place of a tiny one: nano")
    arguments = parser.parse_args()
    count, seed = arguments.count, arguments.seed
    for kind, run in (("decode", decode), ("transcribe", transcripts)):
        if kind in arguments.only:
            print(json.dumps({kind: run(count, seed)}), flush=True)
    if not {"files", "bodies"} & set(arguments.only):
        return
    with (
        running_server(*_load(arguments.model), served_model_name="fuzzed") as server,
        httpx.Client(base_url=server.url, timeout=LIMIT_S) as client,
    ):
        if "files" in arguments.only:
            print(json.dumps({"files": fuzz_files(client, "fuzzed", count, seed)}), flush=True)
        if "bodies" in arguments.only:
            print(json.dumps({"bodies": fuzz_bodies(client, "fuzzed", count, seed)}), flush=True)


if __name__ == "__main__":
    main()
