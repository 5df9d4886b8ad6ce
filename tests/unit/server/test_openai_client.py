"""The official client, sync and async, unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.server_runs import RunningServer, audio_part, wav


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(*content: Any) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def library_answer(model: Any, processor: AudioFlamingo3Processor, messages: Any, **options: Any) -> str:
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    output = model.generate(**batch, **options)
    return processor.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[return-value]


def test_models(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert (found.id, found.object, found.owned_by) == ("tiny", "model", "audioflamingo")
    assert isinstance(found.created, int)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_text_answer_equals_the_librarys(
    client: openai.OpenAI, model: Any, processor: AudioFlamingo3Processor
) -> None:
    messages: Any = [
        {"role": "developer", "content": "You are the sound of France."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " it?"}]},
    ]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=10, temperature=0
    )
    expected = library_answer(
        model,
        processor,
        [{**messages[0], "role": "system"}, *messages[1:]],
        max_new_tokens=10,
        do_sample=False,
    )
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.object == "chat.completion"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.audio_tokens == 0


def test_clips_in_several_turns(
    client: openai.OpenAI, model: Any, processor: AudioFlamingo3Processor
) -> None:
    first, second = wav(1.0), wav(2.0)
    messages: Any = [
        *ask("What", audio_part(first), "and", audio_part(second)),
        {"role": "assistant", "content": "the end"},
        *ask(audio_part(first), "and this?"),
    ]
    library_messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What"},
                {"type": "audio", "audio": first},
                {"type": "text", "text": "and"},
                {"type": "audio", "audio": second},
            ],
        },
        messages[1],
        {
            "role": "user",
            "content": [{"type": "audio", "audio": first}, {"type": "text", "text": "and this?"}],
        },
    ]
    expected = library_answer(model, processor, library_messages, max_new_tokens=10, do_sample=False)
    for _ in range(2):
        reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10)
        assert reply.choices[0].message.content == expected
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.audio_tokens == 25 + 50 + 25
    assert reply.usage.prompt_tokens_details.cached_tokens == reply.usage.prompt_tokens - 1


def test_audio_url_with_data_and_with_a_data_prefix_in_input_audio(client: openai.OpenAI) -> None:
    data = audio_part(wav())["input_audio"]["data"]
    url: Any = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}}
    prefixed: Any = {
        "type": "input_audio",
        "input_audio": {"data": f"data:audio/wav;base64,{data}", "format": "mp3"},
    }
    answers = {
        client.chat.completions.create(model="tiny", messages=ask(part, "What"), max_tokens=8)  # type: ignore[arg-type]
        .choices[0]
        .message.content
        for part in (url, prefixed, audio_part(wav()))
    }
    assert len(answers) == 1


def test_streams_hold_role_text_end_and_usage(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": ask("tool call"), "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_seed_temperature_and_n(
    client: openai.OpenAI, model: Any, processor: AudioFlamingo3Processor
) -> None:
    options: Any = {
        "model": "tiny",
        "messages": ask("tool call"),
        "max_tokens": 12,
        "temperature": 1.5,
        "seed": 7,
    }
    reply = client.chat.completions.create(**options, n=3, extra_body={"top_k": 100})
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1
    one = client.chat.completions.create(**options, extra_body={"top_k": 100})
    assert one.choices[0].message.content == reply.choices[0].message.content
    expected = library_answer(
        model,
        processor,
        ask("tool call"),
        max_new_tokens=12,
        do_sample=True,
        temperature=1.5,
        seed=7,
        top_k=100,
    )
    assert one.choices[0].message.content == expected
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**options, n=3, stream=True, extra_body={"top_k": 100}):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == [choice.message.content for choice in reply.choices]


def test_stop_and_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": ask("tool call"), "max_tokens": 20}
    text = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = text[5:8]
    for stops in (stop, ["never said", stop]):
        reply = client.chat.completions.create(**options, stop=stops)
        assert reply.choices[0].message.content == text[: text.index(stop)]
        assert reply.choices[0].finish_reason == "stop"
    reply = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode(errors="replace") == text
    assert all(entry.top_logprobs[0].logprob == pytest.approx(entry.logprob) for entry in content)
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_errors_have_types_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=ask("hello"))  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=ask("hello"), temperature=3)  # type: ignore[arg-type]
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=ask("the " * 21000))  # type: ignore[arg-type]
    assert long.value.code == "context_length_exceeded"


def test_transcription_formats(client: openai.OpenAI) -> None:
    plain = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav(2.0)))
    assert isinstance(plain.text, str)
    assert plain.usage is not None
    assert plain.usage.type == "tokens"
    text = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav(2.0)), response_format="text")
    assert str(text).strip() == plain.text
    verbose = client.audio.transcriptions.create(
        model="tiny",
        file=("a.wav", wav(2.0)),
        response_format="verbose_json",
        language="en",
        timestamp_granularities=["segment", "word"],
    )
    assert verbose.duration == 2.0
    assert verbose.words is not None
    assert all(0 <= word.start <= word.end <= 2 for word in verbose.words)
    assert verbose.language == "en"
    events = list(client.audio.transcriptions.create(model="tiny", file=("a.wav", wav(2.0)), stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == plain.text
    with pytest.raises(openai.BadRequestError, match="'segment' or 'word'"):
        client.audio.transcriptions.create(
            model="tiny",
            file=("a.wav", wav()),
            response_format="verbose_json",
            timestamp_granularities=["letter"],  # type: ignore[list-item]
        )


def test_the_async_client_asks_many_things_at_once(client: openai.OpenAI, server: RunningServer) -> None:
    questions = [ask(f"the {i}", *([audio_part(wav(1 + i % 3))] if i % 2 else [])) for i in range(12)]
    options: Any = {"model": "tiny", "max_tokens": 10, "temperature": 1.0, "seed": 3}
    alone = [
        client.chat.completions.create(messages=q, **options).choices[0].message.content for q in questions
    ]  # type: ignore[arg-type]

    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:
            replies = [many.chat.completions.create(messages=q, **options) for q in questions]  # type: ignore[arg-type]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*replies)]

    assert asyncio.run(run()) == alone
