"""Words of known clients: what steers the answer does, what changes nothing is left aside, the rest is refused."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.audio_files import encode, tone
from tests.support.server_runs import RunningServer, audio_part, chat_body, wav

SPEECH = Path(__file__).parents[2] / "data" / "directory_prompt.flac"
CHAT = "/v1/chat/completions"
FORM = "/v1/audio/transcriptions"


def answer(server: RunningServer, body: dict[str, Any]) -> str:
    with server.client() as client:
        reply = client.post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def test_fields_that_change_nothing(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Open WebUI's, OpenRouter's, llama.cpp's and vLLM's, at the values that their clients send."""
    extra = {
        "chat_id": "1",
        "session_id": "2",
        "background_tasks": {"title_generation": True},
        "features": {"web_search": False},
        "cache_prompt": True,
        "keep_alive": "5m",
        "skip_special_tokens": True,
        "chat_template_kwargs": {},
        "ignore_eos": False,
        "tools": [],
        "transforms": ["middle-out"],
    }
    with caplog.at_level(logging.INFO, "audioflamingo.server"):
        assert answer(server, chat_body("hello", **extra)) == answer(server, chat_body("hello"))
    ignored = [
        record.fields["ignored_fields"] for record in caplog.records if "ignored_fields" in record.fields
    ]
    assert ignored == [sorted(extra)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_eos", True),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("best_of", 3),
        ("grammar", "x"),
    ],
)
def test_fields_that_would_change_the_answer(server: RunningServer, name: str, value: Any) -> None:
    with server.client() as client:
        error = client.post(CHAT, json=chat_body("hello", **{name: value})).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_fields_of_a_form(server: RunningServer) -> None:
    with server.client() as client:

        def text(**fields: str) -> Any:
            return client.post(FORM, data={"model": "tiny", **fields}, files={"file": wav()}).json()

        assert text(user="me", vad_filter="true")["text"] == text()["text"]
        assert text(vad_filter="false")["error"]["param"] == "vad_filter"


def test_logit_bias(server: RunningServer, processor: AudioFlamingo3Processor) -> None:
    """-100 forbids what the answer began with, 100 makes it say nothing else."""
    wanted = processor.tokenizer.encode_plain("sound")[0]
    said = [list(processor.tokenizer.token_bytes(i)) for i in range(len(processor.tokenizer))]

    def tokens(**fields: Any) -> list[list[int]]:
        with server.client() as client:
            body = chat_body("hello", logprobs=True, max_tokens=3, **fields)
            reply = client.post(CHAT, json=body).json()
        return [entry["bytes"] for entry in reply["choices"][0]["logprobs"]["content"]]

    first = tokens()[0]
    assert first not in tokens(logit_bias={str(said.index(first)): -100})
    assert tokens(logit_bias={str(wanted): 100}) == [list(b"sound")] * 3


@pytest.mark.parametrize("bias", [{"501": 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": "a"}, {str(2**70): 1}])
def test_biases_that_are_none(server: RunningServer, bias: dict[str, Any]) -> None:
    with server.client() as client:
        reply = client.post(CHAT, json=chat_body("hello", logit_bias=bias))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("logit_bias")


class TestContinuedAnswers:
    def test_the_answer_goes_on(
        self, server: RunningServer, model: Any, processor: AudioFlamingo3Processor
    ) -> None:
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the sound of"}]
        options = {"continue_final_message": True, "add_generation_prompt": False}
        body = {"model": "tiny", "messages": messages, "max_tokens": 6, "temperature": 0, **options}
        batch = processor.apply_chat_template(
            messages, tokenize=True, continue_final_message=True, return_dict=True
        )
        output = model.generate(**batch, max_new_tokens=6, do_sample=False)
        expected = processor.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer(server, body) == expected
        assert answer(server, {**body, "add_generation_prompt": None}) == expected

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"continue_final_message": True}, "continue_final_message"),
            ({"add_generation_prompt": False}, "add_generation_prompt"),
        ],
    )
    def test_without_an_answer_to_go_on_with(
        self, server: RunningServer, fields: dict[str, Any], param: str
    ) -> None:
        with server.client() as client:
            reply = client.post(CHAT, json=chat_body("hello", **fields))
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == param

    def test_contradiction(self, server: RunningServer) -> None:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        body = {"model": "tiny", "messages": messages, "continue_final_message": True}
        with server.client() as client:
            reply = client.post(CHAT, json={**body, "add_generation_prompt": True})
        assert reply.status_code == 400


class TestTranslations:
    def test_the_official_client(self, server: RunningServer) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        reply = client.audio.translations.create(model="tiny", file=("a.wav", wav()))
        assert isinstance(reply.text, str)
        whole = client.audio.translations.create(
            model="tiny", file=("a.wav", wav()), response_format="verbose_json"
        )
        assert (whole.task, whole.language) == ("translate", "english")  # type: ignore[attr-defined]

    def test_what_the_model_is_asked(self, server: RunningServer) -> None:
        """As the family was trained to be asked, with the language where the client says it."""
        from starlette.datastructures import FormData

        from audioflamingo.server.transcription_route import TranslationRoute

        route = TranslationRoute(server.service)
        assert route.instruction(FormData([])) == "Translate any speech you hear into English."
        asked = route.instruction(FormData([("language", "German")]))
        assert asked == "Translate any speech you hear from German into English."

    def test_the_instruction_is_used(self, server: RunningServer) -> None:
        with server.client() as client:

            def tokens(path: str, **fields: str) -> int:
                form = {"model": "tiny", **fields}
                reply = client.post(path, data=form, files={"file": SPEECH.read_bytes()}).json()
                return reply["usage"]["input_token_details"]["text_tokens"]

            own = tokens(FORM, instruction="Translate any speech you hear into English.")
            assert tokens("/v1/audio/translations") == own
            assert tokens(FORM) != own


def test_a_compressed_body(server: RunningServer) -> None:
    body = gzip.compress(json.dumps(chat_body("hello")).encode())
    with server.client() as client:
        reply = client.post(CHAT, content=body, headers={"content-encoding": "gzip"})
        plain = client.post(CHAT, json=chat_body("hello"), headers={"content-encoding": "identity"})
    assert reply.status_code == 415
    assert "'gzip'" in reply.json()["error"]["message"]
    assert plain.status_code == 200


@pytest.mark.parametrize("path", [CHAT, FORM])
def test_errors_about_an_upload_name_no_class(server: RunningServer, path: str) -> None:
    with server.client() as client:
        if path == CHAT:
            reply = client.post(path, json=chat_body(audio_part(b"<html>no audio</html>")))
        else:
            reply = client.post(path, data={"model": "tiny"}, files={"file": b"<html>no audio</html>"})
    assert reply.status_code == 400
    assert "BytesIO" not in reply.text


def test_a_stream_says_that_there_was_no_speech(server: RunningServer) -> None:
    silence = encode(np.zeros(16000, dtype=np.float32), 16000, "wav")
    with server.client() as client:
        form = {"model": "tiny", "stream": "true"}
        lines = client.post(FORM, data=form, files={"file": silence}).text.splitlines()
    done = json.loads(lines[0].removeprefix("data: "))
    assert (done["type"], done["text"], done["no_speech"]) == ("transcript.text.done", "", True)


@pytest.mark.parametrize("channel", ["left", "right", "mix"])
def test_a_channel_of_a_clip(server: RunningServer, channel: str) -> None:
    """The answer about one side of a call is that about a file of this side alone."""
    sides = np.stack([tone(1.0)[:, 0], tone(1.0, channels=2)[:, 1]], axis=1)
    alone = {"left": sides[:, :1], "right": sides[:, 1:], "mix": sides.mean(axis=1, keepdims=True)}[channel]
    part = audio_part(encode(sides, 16000, "wav"))
    part["input_audio"]["channel"] = channel
    wanted = chat_body("What is", audio_part(encode(alone, 16000, "wav")))
    assert answer(server, chat_body("What is", part)) == answer(server, wanted)


def test_a_track_that_is_not_there(server: RunningServer) -> None:
    part = audio_part(wav())
    part["input_audio"]["track"] = 2
    with server.client() as client:
        reply = client.post(CHAT, json=chat_body("What is", part))
    assert reply.status_code == 400
    assert "track" in reply.json()["error"]["message"]
