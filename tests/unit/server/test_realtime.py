"""Live sessions: OpenAI's own client speaks to the server while a recording is played to it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import av
import httpx2 as httpx
import numpy as np
import openai
import pytest
import soxr
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from audioflamingo.audio.live_audio import g711_table
from audioflamingo.audio.loading import load_audio
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.server.realtime_input import SoundInput
from audioflamingo.server.realtime_schema import LiveConfig
from audioflamingo.transcription.live import SpeechStarted
from audioflamingo.transcription.windows import Window
from tests.support.live_speech import NUMBERS, SPEECH, count_seconds, talk_with_pauses
from tests.support.live_speech import pcm as pcm_of
from tests.support.scripted_model import ScriptedModel
from tests.support.server_runs import RunningServer, running_server

RATE = 24000
TRANSCRIPTION = "conversation.item.input_audio_transcription"
STEP_S = 0.1


@pytest.fixture(scope="module")
def live(processor: AudioFlamingo3Processor) -> Iterator[RunningServer]:
    settings: Any = {"live_buffer_seconds": 30.0, "cors_origins": ("https://friend.example",)}
    with running_server(ScriptedModel(processor, count_seconds), processor, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def talk() -> np.ndarray:
    return talk_with_pauses()


def pcm(waveform: np.ndarray, rate: int = RATE) -> bytes:
    return pcm_of(soxr.resample(waveform, 16000, rate) if rate != 16000 else waveform)


def pieces(data: bytes, duration_s: float = STEP_S, bytes_a_second: int = 2 * RATE) -> Iterator[str]:
    size = int(duration_s * bytes_a_second) // 2 * 2
    for start in range(0, len(data), size):
        yield base64.b64encode(data[start : start + size]).decode()


def client_of(server: RunningServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def open_session(server: RunningServer, **query: str) -> Any:
    return client_of(server).realtime.connect(extra_query={"intent": "transcription", **query})


def read_until(connection: Any, kind: str, count: int = 1) -> list[Any]:
    """Events up to the `count`th of a kind."""
    events: list[Any] = []
    while sum(event.type == kind for event in events) < count:
        events.append(connection.recv())
        assert events[-1].type != "error" or kind == "error", events[-1]
    return events


def told(connection: Any) -> Any:
    """The error that comes next."""
    event = connection.recv()
    assert event.type == "error"
    assert event.error.message.endswith(".")
    return event.error


def append(connection: Any, data: bytes) -> None:
    for piece in pieces(data):
        connection.input_audio_buffer.append(audio=piece)


def test_speech_is_told_while_it_is_spoken_and_whole_when_it_ends(
    live: RunningServer, talk: np.ndarray
) -> None:
    with open_session(live) as connection:
        created = connection.recv()
        assert created.type == "session.created"
        assert created.session.audio.input.transcription.model == "tiny"
        assert created.session.audio.input.turn_detection.silence_duration_ms == 500
        append(connection, pcm(talk))
        events = read_until(connection, f"{TRANSCRIPTION}.completed", 2)
    kinds = [event.type.rpartition(".")[2] for event in events if not event.type.endswith("delta")]
    heard = ["speech_started", "speech_stopped", "committed", "added", "done"]
    assert [kind for kind in kinds if kind != "completed"] == heard * 2
    started = [event for event in events if event.type.endswith("speech_started")]
    stopped = [event for event in events if event.type.endswith("speech_stopped")]
    assert [event.audio_start_ms for event in started] == pytest.approx([1000, 7000], abs=300)
    assert [event.audio_end_ms for event in stopped] == pytest.approx([5000, 10000], abs=500)
    items = [event.item_id for event in started]
    committed = [event for event in events if event.type.endswith("committed")]
    assert [(event.item_id, event.previous_item_id) for event in committed] == [
        (items[0], None),
        (items[1], items[0]),
    ]
    for item, start, end in zip(items, started, stopped, strict=True):
        mine = [event for event in events if getattr(event, "item_id", None) == item]
        (done,) = [event for event in mine if event.type == f"{TRANSCRIPTION}.completed"]
        seconds = (end.audio_end_ms - start.audio_start_ms) / 1000
        assert done.transcript == " ".join(NUMBERS[: int(seconds)])
        assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
        assert done.usage.input_token_details.audio_tokens == pytest.approx(seconds / 0.04, abs=1)
        deltas = [event.delta for event in mine if event.type == f"{TRANSCRIPTION}.delta"]
        assert "".join(deltas) == done.transcript


def test_words_are_told_before_the_speech_ends(live: RunningServer) -> None:
    """Pieces come slowly enough for a draft after each."""
    model: Any = live.service.worker.engine.model
    speech = load_audio(SPEECH)[: 16000 * 6]
    with open_session(live) as connection:
        connection.session.update(
            session={"type": "transcription", "audio": {"input": {"transcription": {"delay": "minimal"}}}}
        )
        read_until(connection, "session.updated")
        for piece in pieces(pcm(speech), 0.5):
            before = len(model.calls)
            connection.input_audio_buffer.append(audio=piece)
            live.wait_until_heard(lambda before=before: len(model.calls) > before)
        connection.session.update(session={"type": "transcription"})  # an answer to wait for
        events = read_until(connection, "session.updated")
        assert not any(event.type.endswith("speech_stopped") for event in events)
        words = "".join(event.delta for event in events if event.type == f"{TRANSCRIPTION}.delta")
        assert words.split() == NUMBERS[: len(words.split())]
        assert 2 <= len(words.split()) <= 6
        connection.input_audio_buffer.commit()
        (*more, done) = read_until(connection, f"{TRANSCRIPTION}.completed")
        words += "".join(event.delta for event in more if event.type == f"{TRANSCRIPTION}.delta")
        assert words == done.transcript
        assert len(done.transcript.split()) >= 5


def test_without_turn_detection_the_client_commits(live: RunningServer, talk: np.ndarray) -> None:
    with open_session(live, model="tiny") as connection:
        connection.session.update(
            session={"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        )
        assert read_until(connection, "session.updated")[-1].session.audio.input.turn_detection is None
        append(connection, pcm(talk))
        connection.input_audio_buffer.commit()
        events = read_until(connection, f"{TRANSCRIPTION}.completed")
        kinds = [event.type for event in events]
        assert "input_audio_buffer.speech_started" not in kinds
        assert kinds.count("input_audio_buffer.committed") == 1
        first, second = NUMBERS[:4], NUMBERS[:3]
        assert events[-1].transcript == " ".join([*first, *second])
        append(connection, pcm(np.zeros(16000, np.float32)))  # nobody speaks
        connection.input_audio_buffer.commit()
        assert read_until(connection, f"{TRANSCRIPTION}.completed")[-1].transcript == ""
        append(connection, pcm(talk[:32000]))
        connection.input_audio_buffer.clear()
        read_until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit()
        assert told(connection).code == "input_audio_buffer_commit_empty"


def test_the_older_interface(live: RunningServer, talk: np.ndarray) -> None:
    headers = {"OpenAI-Beta": "realtime=v1"}
    address = live.url.replace("http", "ws") + "/v1/realtime?intent=transcription"
    with connect(address, additional_headers=headers) as socket:

        def until(kind: str) -> list[dict[str, Any]]:
            events = []
            while not events or events[-1]["type"] != kind:
                events.append(json.loads(socket.recv(30)))
                assert events[-1]["type"] != "error", events[-1]
            return events

        (created,) = until("transcription_session.created")
        assert created["session"]["input_audio_format"] == "pcm16"
        wanted = {
            "input_audio_format": "g711_ulaw",
            "input_audio_transcription": {"model": "tiny", "language": "en", "prompt": ""},
            "turn_detection": {"type": "server_vad", "silence_duration_ms": 300},
            "input_audio_noise_reduction": {"type": "near_field"},
        }
        socket.send(json.dumps({"type": "transcription_session.update", "session": wanted}))
        updated = until("transcription_session.updated")[-1]["session"]
        assert updated["input_audio_format"] == "g711_ulaw"
        assert updated["turn_detection"]["silence_duration_ms"] == 300
        assert updated["turn_detection"]["prefix_padding_ms"] == 300  # as it was
        assert updated["input_audio_noise_reduction"] is None  # there is none, and that is said
        codes = np.argsort(g711_table("ulaw"), kind="stable")
        levels = g711_table("ulaw")[codes]
        low = soxr.resample(talk, 16000, 8000)
        data = codes[np.searchsorted(levels, low).clip(0, 255)].astype(np.uint8).tobytes()
        for piece in pieces(data, bytes_a_second=8000):
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": piece}))
        events = until(f"{TRANSCRIPTION}.completed")
        assert events[-1]["transcript"] == " ".join(NUMBERS[:4])
        assert "conversation.item.created" in [event["type"] for event in events]


@pytest.mark.parametrize(("law", "codec"), [("ulaw", "pcm_mulaw"), ("alaw", "pcm_alaw")])
def test_g711_equals_its_definition(law: Any, codec: str) -> None:
    """ITU-T G.711, by its formulas."""
    table = g711_table(law) * 32768
    for code in range(256):
        if law == "ulaw":
            value = ~code & 0xFF
            size = (((value & 0x0F) << 3) + 0x84 << (value >> 4 & 7)) - 0x84
            sign = -1 if value & 0x80 else 1
        else:
            value = code ^ 0x55
            step, exponent = value & 0x0F, value >> 4 & 7
            size = (step << 4) + 8 if exponent == 0 else ((step << 4) + 0x108) << (exponent - 1)
            sign = 1 if value & 0x80 else -1
        assert table[code] == sign * size
    assert av.Codec(codec, "r").name == codec


BAD = [
    (
        '{"type": "transcription_session.update", "session": {"input_audio_format": ["pcm16"]}}',
        "session.input_audio_format",
        "pcm16, g711_ulaw, g711_alaw",
    ),
    ('{"type": "session.update", "session": {"audio": 5}}', "session.audio", "session.audio: "),
    ("{", None, "the event is not valid JSON"),
    ("[1]", None, "must be a JSON object"),
    ('{"type": "response.create", "event_id": "mine"}', "type", "no event of the type 'response.create'"),
    ('{"type": ["a"]}', "type", "no event of the type"),
    ('{"type": "input_audio_buffer.append"}', "audio", "base64"),
    ('{"type": "input_audio_buffer.append", "audio": 5}', "audio", "base64"),
    ('{"type": "input_audio_buffer.append", "audio": "%%%%"}', "audio", "base64"),
    ('{"type": "input_audio_buffer.append", "audio": "\\ud800"}', "audio", "base64"),
    ('{"type": "input_audio_buffer.append", "audio": "QUJD"}', "audio", "odd number"),
    ('{"type": "input_audio_buffer.commit"}', None, "too small to commit"),
    ('{"type": "session.update"}', "session", "session must be an object"),
    ('{"type": "session.update", "session": {"type": "realtime"}}', "session.type", "transcription"),
    ('{"type": "session.update", "session": {"voice": "a"}}', "session.voice", "no field 'session.voice'"),
    (
        '{"type": "session.update", "session": {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}}',
        "model",
        "'whisper-1' does not exist",
    ),
    (
        '{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"threshold": 2}}}}}',
        "session.audio.input.turn_detection.threshold",
        "less than or equal to 1",
    ),
    (
        '{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}}',
        "session.audio.input.turn_detection.type",
        "server_vad",
    ),
    (
        '{"type": "transcription_session.update", "session": {"input_audio_format": "mp3"}}',
        "session.input_audio_format",
        "pcm16, g711_ulaw, g711_alaw",
    ),
    (
        '{"type": "session.update", "session": {"include": ["item.input_audio_transcription.logprobs"]}}',
        "session.include",
        "not supported",
    ),
]


def test_each_fault_is_one_clear_error_and_the_session_goes_on(live: RunningServer, talk: np.ndarray) -> None:
    with open_session(live) as connection:
        connection.recv()
        for text, param, message in BAD:
            connection.send_raw(text)
            error = told(connection)
            assert message in error.message, text
            assert error.param == param, text
            assert error.type == "invalid_request_error"
            assert error.event_id == ("mine" if "mine" in text else None)
        connection._connection.send(b"\x00\x01")
        assert "JSON text" in told(connection).message
        connection.send_raw(
            json.dumps({"type": "input_audio_buffer.append", "audio": "A" * (15 * 2**20 + 4)})
        )
        assert "15728640" in told(connection).message
        append(connection, pcm(talk[: 16000 * 7]))
        done = read_until(connection, f"{TRANSCRIPTION}.completed")[-1]
        assert done.transcript == " ".join(NUMBERS[:4])


def test_an_event_beyond_all_bounds_ends_the_session(live: RunningServer) -> None:
    with open_session(live) as connection:
        connection.recv()
        with contextlib.suppress(ConnectionClosed):  # it may be over before all is sent
            connection.send_raw("A" * (31 * 2**20))
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv()
        assert caught.value.rcvd is None or caught.value.rcvd.code == 1009
    with open_session(live) as connection:
        assert connection.recv().type == "session.created"


def test_what_does_not_fit_is_refused_whole_and_what_was_taken_is_heard(
    live: RunningServer, talk: np.ndarray
) -> None:
    with open_session(live) as connection:
        connection.session.update(
            session={"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        )
        read_until(connection, "session.updated")
        append(connection, pcm(talk[: 16000 * 6]))
        connection.input_audio_buffer.append(audio=next(pieces(pcm(np.zeros(16000 * 25)), 25)))
        error = told(connection)
        assert error.code == "input_audio_buffer_full"
        assert "6.0 s of audio wait" in error.message
        assert "at most 30 s" in error.message
        assert "25.0 s were not taken" in error.message
        connection.input_audio_buffer.commit()
        done = read_until(connection, f"{TRANSCRIPTION}.completed")[-1]
        assert done.transcript == " ".join(NUMBERS[:4])
        connection.input_audio_buffer.append(audio=next(pieces(pcm(np.zeros(16000 * 25)), 25)))
        connection.input_audio_buffer.clear()
        read_until(connection, "input_audio_buffer.cleared")  # there is room again


def refusal(address: str, **options: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(InvalidStatus) as caught, connect(address, **options):
        pass
    reply = caught.value.response
    assert reply.headers["x-request-id"]
    return reply.status_code, json.loads(reply.body)["error"]


def test_who_may_not_come_in_is_told_in_plain_http(live: RunningServer) -> None:
    address = live.url.replace("http", "ws") + "/v1/realtime"
    assert refusal(f"{address}?intent=conversation")[1]["param"] == "intent"
    status, error = refusal(f"{address}?model=gpt-realtime")
    assert (status, error["code"]) == (404, "model_not_found")
    status, error = refusal(address, origin="https://stranger.example")
    assert (status, error["code"]) == (403, "origin_not_allowed")
    for origin in ("https://friend.example", live.url):
        with connect(address, origin=origin) as socket:
            assert json.loads(socket.recv())["type"] == "session.created"
    with live.client() as client:
        reply = client.get("/v1/realtime")
        assert (reply.status_code, reply.json()["error"]["code"]) == (426, "upgrade_required")


def test_the_key_is_needed(processor: AudioFlamingo3Processor) -> None:
    with running_server(ScriptedModel(processor, count_seconds), processor, api_key="sesame") as guarded:
        address = guarded.url.replace("http", "ws") + "/v1/realtime"
        assert refusal(address)[0] == 401
        assert refusal(address, subprotocols=["realtime", "openai-insecure-api-key.wrong"])[0] == 401
        with client_of(guarded, "sesame").realtime.connect() as connection:
            assert connection.recv().type == "session.created"
        with connect(address, subprotocols=["realtime", "openai-insecure-api-key.sesame"]) as socket:  # type: ignore[list-item]
            assert socket.subprotocol == "realtime"
            assert json.loads(socket.recv())["type"] == "session.created"


def test_sessions_count_as_requests_do(processor: AudioFlamingo3Processor, talk: np.ndarray) -> None:
    model = ScriptedModel(processor, count_seconds)
    with running_server(model, processor, max_running=1, max_queue=0) as small, small.client() as client:
        with open_session(small) as connection:
            connection.recv()
            assert "af3_live_sessions 1.0" in client.get("/metrics").text
            status, error = refusal(small.url.replace("http", "ws") + "/v1/realtime")
            assert (status, error["code"]) == (429, "server_busy")
            append(connection, pcm(talk))
            read_until(connection, f"{TRANSCRIPTION}.completed", 2)
        small.wait_until_idle()
        metrics = client.get("/metrics").text
    assert 'af3_requests_total{path="/v1/realtime",status="101"} 1.0' in metrics
    assert 'af3_requests_total{path="/v1/realtime",status="429"} 1.0' in metrics
    (seconds,) = re.findall(r"^af3_audio_seconds_total (.*)$", metrics, re.MULTILINE)
    assert float(seconds) == pytest.approx(len(talk) / 16000)


def test_a_session_has_its_time(processor: AudioFlamingo3Processor) -> None:
    with (
        running_server(ScriptedModel(processor, count_seconds), processor, timeout_seconds=0.3) as hasty,
        open_session(hasty) as connection,
    ):
        connection.recv()
        assert told(connection).code == "session_expired"
        with pytest.raises(ConnectionClosed):
            connection.recv()


def test_the_end_of_the_server_hears_what_was_said(
    processor: AudioFlamingo3Processor, talk: np.ndarray
) -> None:
    with running_server(ScriptedModel(processor, count_seconds), processor) as ending:
        with open_session(ending) as connection:
            connection.recv()
            append(connection, pcm(talk[: 16000 * 4]))  # in the middle of speech
            read_until(connection, "input_audio_buffer.speech_started")
            connection.session.update(session={"type": "transcription"})  # all before it is taken
            read_until(connection, "session.updated")
            stopping = threading.Thread(target=ending.stop)
            stopping.start()
            events: list[Any] = []
            with contextlib.suppress(ConnectionClosed):
                for _ in itertools.count():
                    events.append(connection.recv())
            with pytest.raises(ConnectionClosed) as caught:
                connection.recv()
        stopping.join()
    assert next(e for e in events if e.type == "error").error.code == "shutting_down"
    assert events[-1].type == f"{TRANSCRIPTION}.completed"
    assert events[-1].transcript == " ".join(NUMBERS[:3])
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1001


def test_a_client_that_leaves_stops_its_work(live: RunningServer, talk: np.ndarray) -> None:
    with open_session(live) as connection:
        connection.recv()
        append(connection, pcm(talk[: 16000 * 4]))
    live.wait_until_idle()
    with live.client() as client:
        assert client.get("/health").status_code == httpx.codes.OK


def test_turn_detection_may_change_in_the_middle(talk: np.ndarray) -> None:
    with_turns = LiveConfig()
    without = with_turns.updated({"audio": {"input": {"turn_detection": None}}})
    sound = SoundInput(without.input)
    assert sound.put(pcm(talk[: 16000 * 6])) == []
    assert sound.kept_s == pytest.approx(6.0, abs=0.05)
    started, window = sound.configure(with_turns.input)  # what was kept is searched
    assert isinstance(started, SpeechStarted)
    assert isinstance(window, Window)
    assert (window.start_s, window.end_s) == pytest.approx((1.0, 5.2), abs=0.3)
    assert sound.kept_s == 0
    (started,) = sound.put(pcm(talk[16000 * 6 : 16000 * 9]))
    assert started.start / 16000 == pytest.approx(7.0, abs=0.3)
    (window,) = sound.configure(without.input)  # what was spoken ends here
    assert isinstance(window, Window)
    assert window.end_s == pytest.approx(9.0, abs=0.05)
    assert sound.put(pcm(talk[16000 * 9 : 16000 * 10])) == []
    (window,) = sound.commit()
    assert isinstance(window, Window)
    assert window.start_s == pytest.approx(9.0, abs=0.05)
    assert sound.num_samples == pytest.approx(160_000, abs=5)
