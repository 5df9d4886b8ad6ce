"""Adapters as models of their own, in one running batch; thoughts apart from answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from audioflamingo import quantize
from audioflamingo.errors import ArgumentError
from audioflamingo.server.server_settings import ServerSettings
from tests.support.adapter_folders import save_adapter
from tests.support.generation_models import lively_model
from tests.support.scripted_model import ScriptedModel, framed
from tests.support.server_runs import RunningServer, audio_part, chat_body, running_server, wav
from tests.support.tiny_model import tiny_reference

pytest.importorskip("peft", reason="needs peft")
NAMES = ("tiny", "first", "second")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for index, name in enumerate(NAMES[1:]):
        save_adapter(root / name, tiny_reference(), index, lora_alpha=20)
    return {name: root / name for name in NAMES[1:]}


@pytest.fixture(scope="module")
def model() -> Any:
    model = lively_model()
    model.generation_config.eos_token_id = [511]
    return model


@pytest.fixture(scope="module")
def server(model: Any, processor: Any, folders: dict[str, Path]) -> Iterator[RunningServer]:
    adapters = tuple(f"{name}={folder}" for name, folder in folders.items())
    with running_server(model, processor, adapters=adapters, max_upload_mb=1.0) as running:
        yield running


def test_each_is_a_model(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    assert [found.id for found in client.models.list().data] == list(NAMES)
    with server.client() as plain:
        assert plain.get("/v1/models/second").json()["parent"] == "tiny"
        assert "parent" not in plain.get("/v1/models/tiny").json()
        missing = plain.get("/v1/models/third")
    assert missing.status_code == 404
    assert "this server has 'tiny', 'first', 'second'" in missing.json()["error"]["message"]


def test_one_running_batch_answers_for_all_of_them(server: RunningServer, model: Any, processor: Any) -> None:
    """Each as alone, at the same time and again from the caches."""
    questions = ["What is the sound", "Why do you think so", "Transcribe the input speech and the end of it"]
    expected = {}
    for question in questions:
        for name in NAMES:
            messages = [{"role": "user", "content": question}]
            batch = processor.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True
            )
            adapter = None if name == "tiny" else name
            output = model.generate(**batch, max_new_tokens=12, do_sample=False, adapter=adapter)
            ids = output[0, batch["input_ids"].shape[1] :]
            expected[question, name] = processor.decode(ids, skip_special_tokens=True)
    assert len(set(expected.values())) > len(questions)

    def ask(case: tuple[str, str]) -> str:
        question, name = case
        body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 12}
        with server.client() as client:
            reply = client.post("/v1/chat/completions", json={**body, "temperature": 0}).json()
        assert reply["model"] == name
        return reply["choices"][0]["message"]["content"]

    cases = list(expected) * 2
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(ask, cases)) == [expected[case] for case in cases]


def test_audio_and_transcriptions(server: RunningServer) -> None:
    with server.client() as client:
        texts = []
        for name in NAMES:
            body = {**chat_body(audio_part(wav()), "What is it"), "model": name, "temperature": 0}
            texts.append(
                client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            )
            form = {"model": name, "temperature": "0"}
            reply = client.post("/v1/audio/transcriptions", data=form, files={"file": ("a.wav", wav())})
            assert reply.status_code == 200
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (("think",), "NAME=FOLDER"),
        (("=x",), "NAME=FOLDER"),
        (("a=x", "a=y"), "names that differ"),
    ],
)
def test_wrong_settings(adapters: tuple[str, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ServerSettings(adapters=adapters)


def test_an_adapter_may_not_be_called_as_the_model(model: Any, processor: Any, folders: Any) -> None:
    with (
        pytest.raises(ArgumentError, match="the model itself is called so"),
        running_server(model, processor, adapters=(f"tiny={folders['first']}",)),
    ):
        pass


@pytest.fixture
def thinking(processor: Any) -> Iterator[RunningServer]:
    def script(seconds: float, attempt: int) -> str:
        return "<think>\nThe sound is a tone.\n</think>\n\n" + framed("hello")

    with running_server(ScriptedModel(processor, script), processor, cache_tokens=4000) as running:
        yield running


def streamed_deltas(server: RunningServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0]["delta"] for line in lines]


def said(deltas: list[dict[str, Any]], name: str) -> str:
    return "".join(delta.get(name, "") for delta in deltas)


def test_thoughts_have_a_field_of_their_own(thinking: RunningServer) -> None:
    body = chat_body("What is it", max_tokens=200, temperature=0)
    with thinking.client() as client:
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "The sound is a tone."
    assert message["content"] == framed("hello")


def test_thoughts_are_streamed_in_it(thinking: RunningServer) -> None:
    body = chat_body("What is it", max_tokens=200, temperature=0, stream=True)
    deltas = streamed_deltas(thinking, body)
    assert said(deltas, "reasoning_content") == "The sound is a tone."
    assert said(deltas, "content") == framed("hello")
    order = [name for delta in deltas for name in delta if name != "role" and delta[name]]
    assert order == sorted(order, reverse=True)  # thoughts first


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_thoughts_that_the_prompt_began(processor: Any, is_streamed: bool) -> None:
    """An answer forced into thoughts by a turn that opens them: what follows is thoughts until they are closed."""
    turns = [{"role": "user", "content": "What is it"}, {"role": "assistant", "content": "<think>\n"}]
    body = {"model": "tiny", "messages": turns, "max_tokens": 200, "temperature": 0, "stream": is_streamed}
    body |= {"continue_final_message": True, "add_generation_prompt": False}
    answer = "A tone.\n</think>\n\nIt hums."
    model = ScriptedModel(processor, lambda seconds, attempt: answer, opening="assistant\n<think>\n")
    with running_server(model, processor, cache_tokens=4000) as running:
        if is_streamed:
            deltas = streamed_deltas(running, body)
        else:
            with running.client() as client:
                reply = client.post("/v1/chat/completions", json=body).json()
            deltas = [reply["choices"][0]["message"]]
    assert (said(deltas, "reasoning_content"), said(deltas, "content")) == ("A tone.", "It hums.")


def test_an_adapter_on_a_quantized_model(processor: Any, folders: dict[str, Path]) -> None:
    """Served beside each other: as each alone in the library."""
    model = quantize(lively_model(), "int8")
    model.generation_config.eos_token_id = [511]
    question = [{"role": "user", "content": "What is the sound"}]
    adapters = tuple(f"{name}={folder}" for name, folder in folders.items())
    found, expected = [], []
    with running_server(model, processor, adapters=adapters) as running:
        batch = processor.apply_chat_template(
            question, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        for name in NAMES:
            body = {"model": name, "messages": question, "max_tokens": 12, "temperature": 0}
            with running.client() as client:
                reply = client.post("/v1/chat/completions", json=body).json()
            found.append(reply["choices"][0]["message"]["content"])
            adapter = None if name == "tiny" else name
            output = model.generate(**batch, max_new_tokens=12, do_sample=False, adapter=adapter)
            ids = output[0, batch["input_ids"].shape[1] :]
            expected.append(processor.decode(ids, skip_special_tokens=True))
    assert found == expected
    assert len(set(found)) == len(NAMES)
