"""Mutated events for live sessions, in any order: each is refused in one line or taken, and the next one too.

    python -m tests.support.fuzz_live --count 2000

sends so many events over a twentieth as many sockets; every fourth client goes without a word.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from audioflamingo.audio.loading import load_audio
from tests.support.fuzz import LIMIT_S, mutate_bytes, mutate_json
from tests.support.live_speech import SPEECH, count_seconds, pcm
from tests.support.scripted_model import ScriptedModel, tiny_processor
from tests.support.server_runs import RunningServer, running_server

A_SESSION = 20  # events
END = {"type": "no such event", "event_id": "the end"}  # is answered with an error that names it
TOO_BIG = 1009  # why a socket is closed
Event = dict[str, Any]


def good_events(speech: bytes, rng: random.Random) -> list[Event]:
    """One of each kind, with as many fields as it has."""
    turns = rng.choice((None, {"type": "server_vad", "threshold": 0.5, "silence_duration_ms": 300}))
    transcription = {
        "model": "tiny",
        "language": "en",
        "prompt": "names",
        "delay": rng.choice(("minimal", "xhigh")),
    }
    sound = {
        "type": rng.choice(("audio/pcm", "audio/pcmu", "audio/pcma")),
        "rate": rng.choice((None, 8000, 24000)),
    }
    new = {"format": sound, "transcription": transcription, "turn_detection": turns, "noise_reduction": None}
    old = {
        "input_audio_format": rng.choice(("pcm16", "g711_ulaw", "g711_alaw")),
        "input_audio_transcription": {"model": "tiny", "prompt": ""},
        "turn_detection": turns,
    }
    start = rng.randrange(0, len(speech), 2)
    piece = speech[start : start + rng.choice((2, 480, 4800, 48_000, 144_000))]
    append = {"type": "input_audio_buffer.append", "audio": base64.b64encode(piece).decode()}
    return [
        {
            "type": "session.update",
            "session": {"type": "transcription", "audio": {"input": new}},
            "event_id": "a",
        },
        {"type": "transcription_session.update", "session": old},
        *[append] * 4,
        {"type": "input_audio_buffer.commit", "event_id": "b"},
        {"type": "input_audio_buffer.clear"},
    ]


def mutated_event(speech: bytes, rng: random.Random) -> str | bytes:
    """An event: as it should be, with other values, other bytes, too deep, too long, or half a sample."""
    event = rng.choice(good_events(speech, rng))
    kind = rng.randrange(10)
    if kind < 4:
        return json.dumps(event)
    if kind < 6:
        for _ in range(rng.choice((1, 1, 2, 4))):
            event = mutate_json(event, rng)
        return json.dumps(event)
    if kind == 6:
        return mutate_bytes(json.dumps(event).encode(), rng).decode("utf-8", "replace")
    if kind == 7:
        depth = rng.choice((50, 5000, 100_000))
        return f'{{"type": "session.update", "session": {"[" * depth}1{"]" * rng.choice((0, depth))}}}'
    if kind == 8:
        return rng.choice((b"", b"\x00\x01", rng.randbytes(500), json.dumps(event).encode()))
    data = rng.choice((speech[:4801], b"\x00", rng.randbytes(9), speech[: 3 * 2**20], bytes(12 * 2**20)))
    audio = base64.b64encode(data).decode()[: rng.choice((None, None, -1))]
    return json.dumps({"type": "input_audio_buffer.append", "audio": audio})


def _session(
    url: str, count: int, is_abrupt: bool, speech: bytes, rng: random.Random
) -> collections.Counter[str]:
    """Sends `count` events in one session. Counts what the server said to them."""
    counts: collections.Counter[str] = collections.Counter()
    with connect(url, max_size=None) as socket:
        try:
            for _ in range(count):
                socket.send(mutated_event(speech, rng))
            if is_abrupt:
                socket.socket.close()
                return collections.Counter(gone=1)
            socket.send(json.dumps(END))
            for event in _events(socket):
                kind = event["type"].rpartition(".")[2]
                counts[kind] += 1
                if kind in ("error", "failed"):
                    _check(event)
        except ConnectionClosed as error:
            if error.rcvd is None or error.rcvd.code != TOO_BIG:
                raise
            counts["too big"] += 1
    return counts


def _events(socket: ClientConnection) -> Any:
    """What the server says, to the answer of the last event."""
    while True:
        event = json.loads(socket.recv(LIMIT_S))
        yield event
        if event["type"] == "error" and event["error"]["event_id"] == END["event_id"]:
            return


def _check(event: Event) -> None:
    """An error that makes no sense fails."""
    error = event["error"]
    assert error["code"] != "internal_error", event
    assert error["type"] != "server_error", event
    assert error["message"].endswith("."), event
    assert "\n" not in error["message"], event
    assert len(error["message"]) < 1000, event


def fuzz_sessions(server: RunningServer, count: int, seed: int) -> dict[str, int]:
    """Sends `count` mutated events. Returns the number of the server's by kind."""
    rng = random.Random(seed)
    speech = pcm(load_audio(SPEECH))
    url = server.url.replace("http", "ws") + "/v1/realtime"
    counts: collections.Counter[str] = collections.Counter()
    for number in range(0, count, A_SESSION):
        is_abrupt = number // A_SESSION % 4 == 3
        counts += _session(url, min(A_SESSION, count - number), is_abrupt, speech, rng)
    server.wait_until_idle()
    with connect(url) as socket:
        assert json.loads(socket.recv(LIMIT_S))["type"] == "session.created"
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="events")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processor = tiny_processor(Path(folder))
    with running_server(ScriptedModel(processor, count_seconds), processor) as server:
        print(json.dumps(fuzz_sessions(server, arguments.count, arguments.seed)))


if __name__ == "__main__":
    main()
