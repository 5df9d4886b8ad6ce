"""Transcriptions over HTTP equal the package's own, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audioflamingo.audio.loading import load_audio
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.server.transcription_job import Transcription
from audioflamingo.transcription import Segment, format_transcript, transcribe
from audioflamingo.transcription.windows import Window
from tests.support.audio_files import encode
from tests.support.server_runs import RunningServer, running_server

SPEECH = Path(__file__).parents[2] / "data" / "directory_prompt.flac"


@pytest.fixture(scope="module")
def talk() -> bytes:
    """Speech, two seconds of silence, and the speech again."""
    speech = load_audio(SPEECH)
    whole = np.concatenate([speech, np.zeros(32000, np.float32), speech])
    return encode(whole[:, None], 16000, "flac")


@pytest.fixture(scope="module")
def expected(model: Any, processor: AudioFlamingo3Processor, talk: bytes) -> list[Segment]:
    segments = list(transcribe(model, processor, talk))
    assert len(segments) >= 2
    assert any(segment.text for segment in segments)
    return segments


def post(server: RunningServer, data: bytes, name: str = "a.flac", **fields: Any) -> Any:
    with server.client() as client:
        return client.post(
            "/v1/audio/transcriptions", files={"file": (name, data)}, data={"model": "tiny", **fields}
        )


def text_of(segments: list[Segment]) -> str:
    return " ".join(" ".join(segment.text.split()) for segment in segments if segment.text.strip())


def test_a_part_without_a_file_name(server: RunningServer, talk: bytes, expected: list[Segment]) -> None:
    """Some clients leave the name out; the server said that there was no file."""

    def send(content: bytes) -> Any:
        head = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
        head += b'--b\r\nContent-Disposition: form-data; name="file"\r\nContent-Type: audio/flac\r\n\r\n'
        with server.client() as client:
            return client.post(
                "/v1/audio/transcriptions",
                content=head + content + b"\r\n--b--\r\n",
                headers={"content-type": "multipart/form-data; boundary=b"},
            )

    reply = send(talk)
    assert (reply.status_code, reply.json()["text"]) == (200, text_of(expected))
    reply = send(b"talk.flac")  # a name in place of the file
    assert reply.status_code == 400
    assert "one part 'file'" in reply.json()["error"]["message"]


def test_json_is_the_packages_transcript(server: RunningServer, talk: bytes, expected: list[Segment]) -> None:
    reply = post(server, talk)
    assert reply.status_code == 200
    content = reply.json()
    assert content["text"] == text_of(expected)
    usage = content["usage"]
    assert usage["type"] == "tokens"
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    details = usage["input_token_details"]
    assert usage["input_tokens"] == details["text_tokens"] + details["audio_tokens"]
    assert details["audio_tokens"] > 0


def test_plain_formats_are_plain_text(server: RunningServer, talk: bytes, expected: list[Segment]) -> None:
    for name in ("srt", "vtt"):
        reply = post(server, talk, response_format=name)
        assert reply.headers["content-type"].startswith("text/plain")
        assert reply.text == format_transcript(expected, name)
    assert post(server, talk, response_format="text").text == text_of(expected) + "\n"


def test_verbose_json_has_true_times(server: RunningServer, talk: bytes, expected: list[Segment]) -> None:
    reply = post(
        server, talk, response_format="verbose_json", **{"timestamp_granularities[]": "segment"}
    ).json()
    spoken = [segment for segment in expected if segment.text.strip()]
    assert reply["duration"] == pytest.approx(2 * len(load_audio(SPEECH)) / 16000 + 2, abs=1e-3)
    assert reply["text"] == text_of(expected)
    assert [s["id"] for s in reply["segments"]] == list(range(len(spoken)))
    for found, segment in zip(reply["segments"], spoken, strict=True):
        assert (found["start"], found["end"]) == (round(segment.start_s, 3), round(segment.end_s, 3))
        assert found["text"] == segment.text
        assert found["tokens"] == list(segment.tokens)
        assert found["avg_logprob"] == pytest.approx(segment.avg_logprob, abs=1e-4)
        assert 0 <= found["no_speech_prob"] < 0.5
        assert found["compression_ratio"] > 0
        assert found["temperature"] == 0


def test_a_stream_gives_segments_then_the_whole(
    server: RunningServer, talk: bytes, expected: list[Segment]
) -> None:
    reply = post(server, talk, stream="true")
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *deltas, done = [json.loads(line) for line in lines[:-1]]
    assert {delta["type"] for delta in deltas} == {"transcript.text.delta"}
    assert len(deltas) == len([segment for segment in expected if segment.text.strip()])
    assert "".join(delta["delta"] for delta in deltas) == done["text"] == text_of(expected)
    assert done["type"] == "transcript.text.done"
    assert done["usage"]["output_tokens"] > 0


def test_instruction_replaces_the_prompt_and_prompt_is_a_hint(
    server: RunningServer, model: Any, processor: AudioFlamingo3Processor, talk: bytes
) -> None:
    def library(prompt: str) -> str:
        return text_of(list(transcribe(model, processor, talk, prompt=prompt)))

    assert post(server, talk, instruction="What is the sound").json()["text"] == library("What is the sound")
    hinted = post(server, talk, prompt="France").json()["text"]
    assert hinted == library("Transcribe the input speech. Context: France")


def test_silence_is_an_empty_transcript(server: RunningServer) -> None:
    silence = encode(np.zeros((32000, 1), np.float32), 16000, "wav")
    assert post(server, silence).json()["text"] == ""
    assert post(server, silence, response_format="verbose_json").json()["segments"] == []
    assert '"text":""' in post(server, silence, stream="true").text


def test_many_transcriptions_and_chats_at_once_equal_each_alone(
    server: RunningServer, talk: bytes, expected: list[Segment]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda _: post(server, talk).json()["text"], range(6)))
    assert set(replies) == {text_of(expected)}


def test_a_server_with_many_windows_at_work_reads_no_further_ahead(
    server: RunningServer, talk: bytes, expected: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, counts, start = server.service, [], Transcription._start

    def count(work: Transcription, window: Window) -> Any:
        task = start(work, window)
        counts.append(service.num_windows)
        return task

    monkeypatch.setattr(Transcription, "_start", count)
    assert post(server, talk).json()["text"] == text_of(expected)
    assert max(counts) > 1
    counts.clear()
    monkeypatch.setattr(service, "max_windows", 1)
    assert post(server, talk).json()["text"] == text_of(expected)
    assert set(counts) == {1}
    server.wait_until_idle()
    assert service.num_windows == 0


def test_a_damaged_file_is_an_error_and_in_a_stream_an_event(server: RunningServer, talk: bytes) -> None:
    cut = talk[: len(talk) * 3 // 4]
    reply = post(server, cut)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_audio"
    streamed = post(server, cut, stream="true")
    assert streamed.status_code == 200
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "invalid_audio"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"stream": "maybe"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "stream"),
        ({"language": "../../etc"}, "language"),
        ({"timestamp_granularities[]": "char", "response_format": "verbose_json"}, "timestamp_granularities"),
        ({"timestamp_granularities": "segment"}, "timestamp_granularities"),
        ({"include[]": "logprobs"}, "include"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy"),
        ({"languge": "en"}, "languge"),
        ({"prompt": "x" * 4001}, "prompt"),
    ],
)
def test_bad_fields_are_named(server: RunningServer, talk: bytes, fields: dict[str, str], param: str) -> None:
    reply = post(server, talk, **fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def _boundary_of(body: bytes) -> str:
    return "multipart/form-data; boundary=" + body.split(b"\r\n")[0].decode().removeprefix("--")


def test_forms_without_a_good_file_are_refused(server: RunningServer) -> None:
    with server.client() as client:
        path = "/v1/audio/transcriptions"
        assert client.post(path, json={"model": "tiny"}).status_code == 400
        assert client.post(path, data={"model": "tiny"}).status_code == 400
        no_file = client.post(path, files={"other": b"x"}, data={"model": "tiny"})
        assert no_file.json()["error"]["param"] == "other"
        assert client.post(path, files={"file": b"x"}, data={"model": "whisper-1"}).status_code == 404
        assert client.post(path, files={"file": b""}, data={"model": "tiny"}).status_code == 400
        broken = client.post(
            path, content=b"--x\r\nbroken", headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert "ends in the middle" in broken.json()["error"]["message"]
        half = client.build_request("POST", path, files={"file": b"x" * 1000}, data={"model": "tiny"}).read()[
            :-300
        ]
        cut = client.post(path, content=half, headers={"content-type": _boundary_of(half)})
        assert cut.status_code == 400


def test_the_name_of_a_file_is_never_a_path(
    server: RunningServer, talk: bytes, expected: list[Segment]
) -> None:
    for name in ("../../../etc/passwd", "/etc/passwd", "a\x00b.wav", "|ls", "clip.exe", "x" * 1000):
        assert post(server, talk, name=name).json()["text"] == text_of(expected)


def test_audio_longer_than_the_limit_is_refused_by_its_decoded_length(
    model: Any, processor: AudioFlamingo3Processor
) -> None:
    bomb = encode(np.zeros((16000 * 300, 1), np.float32), 16000, "flac")
    assert len(bomb) < 60_000
    with running_server(model, processor, max_audio_seconds=100) as small:
        reply = post(small, bomb)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "audio_too_long"


def test_no_speech_is_said_in_a_header(server: RunningServer, talk: bytes) -> None:
    """An empty transcript looked like any other answer."""
    silence = encode(np.zeros((32000, 1), np.float32), 16000, "flac")
    for response_format in ("json", "text", "srt", "vtt", "verbose_json"):
        assert post(server, silence, response_format=response_format).headers["x-no-speech"] == "true"
    assert "x-no-speech" not in post(server, talk).headers


def test_a_channel_and_a_track_may_be_chosen(server: RunningServer, talk: bytes) -> None:
    speech = load_audio(SPEECH)
    call = encode(np.stack([speech, np.roll(speech, 16000)], axis=1), 16000, "flac")
    content = post(server, call, response_format="verbose_json", channel="each").json()
    assert {segment["channel"] for segment in content["segments"]} <= {"left", "right"}
    assert (
        post(server, call, channel="left").json()
        == post(server, encode(speech[:, None], 16000, "flac")).json()
    )
    assert "channel must be one of mix, left, right, each" in post(server, call, channel="up").text
    for track in ("0", "x", "-1", "99999999"):
        reply = post(server, call, track=track)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "track")
    assert "no audio track 2" in post(server, call, track="2").text
    assert post(server, call, track="1").status_code == 200


def test_damage_may_be_allowed(server: RunningServer, talk: bytes) -> None:
    cut = talk[: len(talk) * 3 // 4]
    assert post(server, cut).status_code == 400
    reply = post(server, cut, allow_damaged="true", response_format="verbose_json")
    assert reply.status_code == 200
    assert 3 < reply.json()["duration"] < len(load_audio(talk)) / 16000
    assert post(server, cut, allow_damaged="perhaps").status_code == 400


def test_a_part_has_the_times_of_the_whole(
    server: RunningServer, talk: bytes, model: Any, processor: AudioFlamingo3Processor
) -> None:
    part = list(transcribe(model, processor, talk, start_s=2.0, end_s=62.5))
    reply = post(server, talk, response_format="verbose_json", start="0:02", end="1m2.5s").json()
    found = [(s["start"], s["end"], s["text"]) for s in reply["segments"]]
    spoken = [segment for segment in part if segment.text.strip()]
    assert found == [(round(s.start_s, 3), round(s.end_s, 3), s.text) for s in spoken]
    assert min(start for start, _, _ in found) >= 2.0
    for fields, param in (({"start": "soon"}, "start"), ({"start": "5", "end": "0:04"}, "end")):
        answer = post(server, talk, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    late = post(server, talk, start="1h")
    assert late.status_code == 400
    assert "was to begin at 3600 s" in late.json()["error"]["message"]
