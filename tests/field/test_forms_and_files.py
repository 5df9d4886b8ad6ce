"""Forms that clients send, files that people have: the sources stand in README.md beside this."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import soundfile

from audioflamingo.audio import load_audio
from audioflamingo.cli.inputs import find_inputs
from audioflamingo.errors import AudioError
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription.segments import Segment
from audioflamingo.transcription.writers import format_transcript
from tests.support.audio_files import encode, tone
from tests.support.generation_models import lively_model
from tests.support.recordings import Track, record
from tests.support.server_runs import RunningServer, audio_part, chat_body, running_server, wav
from tests.support.tiny_tokenizer import write_tiny_processor

SPEECH = (Path(__file__).parents[1] / "data" / "directory_prompt.flac").read_bytes()
FORM = "/v1/audio/transcriptions"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = lively_model()
    model.generation_config.eos_token_id = [10, 11, 12, 497]
    processor = AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))
    with running_server(model, processor) as running:
        yield running


def send(server: RunningServer, file: Any = SPEECH, **fields: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(FORM, data={"model": "tiny", **fields}, files={"file": file})


class TestForms:
    @pytest.mark.parametrize(
        "fields",
        [
            {"chunking_strategy": "auto"},
            {"chunking_strategy[type]": "server_vad"},  # as OpenAI's Python client sends an object
            {"chunking_strategy": '{"type": "server_vad"}'},  # as others do
        ],
    )
    def test_where_a_recording_is_cut(self, server: RunningServer, fields: dict[str, str]) -> None:
        """It is always cut at silences: who asks for that gets it."""
        assert send(server, **fields).json() == send(server).json()

    @pytest.mark.parametrize(
        "fields",
        [
            {"chunking_strategy[type]": "server_vad", "chunking_strategy[threshold]": "0.9"},
            {"chunking_strategy": '{"type": "server_vad", "silence_duration_ms": 100}'},
            {"chunking_strategy": "[" * 10000},
            {"include[0]": "logprobs"},
        ],
    )
    def test_orders_that_are_not_carried_out(self, server: RunningServer, fields: dict[str, str]) -> None:
        reply = send(server, **fields)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] in ("chunking_strategy", "include")

    @pytest.mark.parametrize("name", ["timestamp_granularities", "timestamp_granularities[]"])
    def test_times_of_words(self, server: RunningServer, name: str) -> None:
        reply = send(server, response_format="verbose_json", **{name: ["word", "segment"]}).json()
        assert {"words", "segments"} <= reply.keys()
        assert "words" not in send(server, response_format="verbose_json").json()

    def test_a_list_with_numbers(self, server: RunningServer) -> None:
        """So does PHP write it; it was an unknown field."""
        names = {"timestamp_granularities[0]": "word", "timestamp_granularities[1]": "segment"}
        assert {"words", "segments"} <= send(server, response_format="verbose_json", **names).json().keys()

    @pytest.mark.parametrize("text", ["word,segment", '["word"]'])
    def test_a_list_in_one_field(self, server: RunningServer, text: str) -> None:
        error = send(server, response_format="verbose_json", timestamp_granularities=text).json()["error"]
        assert "send the field twice" in error["message"]

    @pytest.mark.parametrize("name", ["", "audio", "a.mp3", "a.exe", "ä ö.FLAC"])
    def test_the_name_of_a_file_says_nothing(self, server: RunningServer, name: str) -> None:
        reply = send(server, (name, SPEECH, "application/octet-stream"))
        assert reply.json()["text"] == send(server).json()["text"]

    def test_a_form_of_unknown_length(self, server: RunningServer) -> None:
        """Standard input sent on as it comes, in chunks."""
        whole = httpx.Request("POST", "http://x", data={"model": "tiny"}, files={"file": SPEECH})
        body, headers = whole.read(), {"content-type": whole.headers["content-type"]}
        pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
        with server.client() as client:
            reply = client.post(FORM, content=pieces, headers=headers)
        assert reply.json()["text"] == send(server).json()["text"]

    def test_a_stream_and_its_last_event(self, server: RunningServer) -> None:
        """What was said is the sum of the pieces; the last event ends with an empty line, or clients drop it."""
        reply = send(server, stream="true")
        assert reply.text.endswith("\n\n")
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        pieces = "".join(e["delta"] for e in events if e["type"] == "transcript.text.delta")
        assert events[-1]["type"] == "transcript.text.done"
        assert events[-1]["text"] == pieces == send(server).json()["text"]


class TestChats:
    def test_more_clips_than_five(self, server: RunningServer) -> None:
        """Each is heard in its place: two that change places change what is read, not how much."""
        clips = [audio_part(wav(0.3 + 0.1 * number)) for number in range(7)]
        with server.client() as client:
            reply = client.post(CHAT, json=chat_body(*clips, "which", max_tokens=1)).json()
            one_by_one = [
                client.post(CHAT, json=chat_body(clip, "which", max_tokens=1)).json() for clip in clips
            ]
        counts = [r["usage"]["prompt_tokens_details"]["audio_tokens"] for r in one_by_one]
        assert reply["usage"]["prompt_tokens_details"]["audio_tokens"] == sum(counts)

    def test_an_address_without_its_object(self, server: RunningServer) -> None:
        """The place is the field that the client wrote, without the checker's own branches and names."""
        part = {"type": "audio_url", "audio_url": "data:audio/wav;base64,"}
        with server.client() as client:
            error = client.post(CHAT, json=chat_body(part)).json()["error"]
        assert error["param"] == "messages.0.content.0.audio_url"
        assert error["message"] == "messages.0.content.0.audio_url: Input should be an object."

    def test_a_path_that_is_not_there(self, server: RunningServer) -> None:
        with server.client() as client:
            near, far = (client.post(path, json={}) for path in ("/audio/transcriptions", "/inference"))
        assert near.json()["error"]["message"] == (
            "there is no '/audio/transcriptions' here; did you mean /v1/audio/transcriptions?"
        )
        assert far.json()["error"]["message"] == "there is no '/inference' here."


class TestFiles:
    def test_voice_memos_and_other_endings_in_a_folder(self, tmp_path: Path) -> None:
        """They were passed over without a word."""
        memo = record("mov", "aac", 44100, Track(duration_s=1.0))
        for name in ("memo.qta", "call.3G2", "talk.MPGA", "note.weba", "film.m4v", "readme.txt"):
            (tmp_path / name).write_bytes(memo)
        names = [Path(found.name).name for found in find_inputs([str(tmp_path)])]
        assert names == ["call.3G2", "film.m4v", "memo.qta", "note.weba", "talk.MPGA"]
        assert len(load_audio(tmp_path / "memo.qta")) == pytest.approx(16000, abs=400)

    def test_a_file_that_is_named_in_several_ways(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "a.wav").write_bytes(wav())
        os.symlink(tmp_path, tmp_path / "sub" / "ring")
        ways = [tmp_path, tmp_path / "a.wav", tmp_path / "sub" / ".." / "a.wav", f"{tmp_path}/*.wav"]
        assert len(find_inputs(list(map(str, ways)))) == 1

    @pytest.mark.parametrize("name", ["call.pcm", "call.RAW", "call.sln"])
    def test_samples_without_a_header(self, tmp_path: Path, name: str) -> None:
        samples = (tone(1.0, 8000)[:, 0] * 20000).astype("<i2")
        (tmp_path / name).write_bytes(samples.tobytes())
        with pytest.raises(AudioError, match=r"samples without a header .* Pass \(rate, samples\)"):
            load_audio(tmp_path / name)
        heard = load_audio((8000, samples))
        assert len(heard) == 16000
        assert np.abs(heard).max() == pytest.approx(np.abs(samples).max() / 2**15, abs=0.02)

    def test_the_lowest_sample(self) -> None:
        """Scaled by 32768, not by 32767: it stays within [-1, 1]."""
        assert load_audio(np.full(400, -(2**15), np.int16)).min() == -1.0

    def test_a_wav_of_unknown_size(self) -> None:
        """A speech server streams it: both sizes are the largest number."""
        data = bytearray(encode(tone(1.0), 16000, "wav"))
        data[4:8] = data[40:44] = struct.pack("<I", 2**32 - 1)
        np.testing.assert_array_equal(load_audio(bytes(data)), load_audio(encode(tone(1.0), 16000, "wav")))

    def test_the_beginning_of_subtitles(self) -> None:
        """Editors refuse a byte order mark, another invisible character or an empty line ahead of the number."""
        for text in ("\ufeffhello", "\u200ehello", "\n\nhello"):
            written = format_transcript([Segment(0.0, 1.0, text)], "srt").encode()
            assert written.startswith(b"1\n00:00:00,000 --> 00:00:01,000\n")

    def test_outputs_of_the_same_name(self, tmp_path: Path) -> None:
        for folder in ("mon", "tue"):
            (tmp_path / folder).mkdir()
            soundfile.write(tmp_path / folder / "talk.wav", tone(0.3)[:, 0], 16000)
        stems = [found.output_stem for found in find_inputs([str(tmp_path / d) for d in ("mon", "tue")])]
        assert len(set(stems)) == 2
