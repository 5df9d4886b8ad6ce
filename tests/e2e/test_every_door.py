"""The same clips asked about at every door get the same words: library, Chat, command line, server, evaluation, Ray's
workers; with and without beams, by every model of the family."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch

from audioflamingo import AutoModelForConditionalGeneration, AutoProcessor, Chat, load_audio
from audioflamingo.audio.loading import SAMPLING_RATE
from audioflamingo.corpus.records import CorpusFile, transcribe_files
from audioflamingo.evaluation import evaluate
from audioflamingo.transcription import Segment, TranscriptionOptions, transcribe
from audioflamingo.transcription.live import listen
from audioflamingo.transcription.writers import joined_text
from tests.support.cli_runs import af3
from tests.support.generation_models import enliven
from tests.support.server_runs import RunningServer, audio_part, chat_body, running_server
from tests.support.tiny_family import BOS_ID, EOS_ID, tiny_music_model, write_music_processor
from tests.support.tiny_model import tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor

SPEECH = Path(__file__).parents[1] / "data/directory_prompt.flac"
QUESTION = "What is the sound"
NUM_NEW = 12


@pytest.fixture(scope="module", params=["greedy", "beams", "music"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose answers vary: one that asks for beams too, and one that hears the time."""
    folder = tmp_path_factory.mktemp(f"door-{request.param}")
    is_music = request.param == "music"
    (write_music_processor if is_music else write_tiny_processor)(folder)
    model = tiny_music_model(seed=1) if is_music else tiny_model()
    enliven(model)
    model.generation_config.eos_token_id = [10, 11, 12, 497]
    model.generation_config.pad_token_id = 0
    model.generation_config.num_beams = 3 if request.param == "beams" else 1
    model.generation_config.max_new_tokens = NUM_NEW
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(40)  # what is heard decides what is said
        if is_music:
            model.lm_head.weight[[BOS_ID, EOS_ID]] = 0
            for layer in model.model.language_model.layers:
                layer.self_attn.o_proj.weight.mul_(5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three clips of unlike length, none so long that a transcription would halve it."""
    folder = tmp_path_factory.mktemp("clips")
    speech, paths = load_audio(SPEECH), []
    for index, (start_s, end_s) in enumerate(((0.0, 1.5), (0.5, 3.0), (4.0, 7.8))):
        paths.append(folder / f"{index}.wav")
        samples = speech[int(start_s * SAMPLING_RATE) : int(end_s * SAMPLING_RATE)]
        soundfile.write(paths[-1], samples, SAMPLING_RATE)
    return paths


@pytest.fixture(scope="module")
def server(loaded: tuple[Any, Any]) -> Iterator[RunningServer]:
    with running_server(*loaded) as running:
        yield running


def conversation(clip: Path) -> list[dict[str, Any]]:
    content = [{"type": "audio", "path": str(clip)}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def library_answers(loaded: tuple[Any, Any], clips: list[Path]) -> list[str]:
    """One batch of all clips."""
    model, processor = loaded
    batch = processor.apply_chat_template(
        [conversation(clip) for clip in clips], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    output = model.generate(**batch)
    answers = processor.decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(answers)) > 1, "answers that are all alike would show nothing"
    return answers


def events(reply: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_stream_says_what_generate_says(loaded: tuple[Any, Any], clips: list[Path]) -> None:
    model, processor = loaded
    batch = processor.apply_chat_template(
        [conversation(clip) for clip in clips], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    columns = [step.token_ids for step in model.stream(**batch)]
    streamed = processor.decode(np.stack(columns, axis=1), skip_special_tokens=True)
    assert streamed == library_answers(loaded, clips)


def test_a_conversation_says_it(loaded: tuple[Any, Any], clips: list[Path]) -> None:
    answers = []
    for clip in clips:
        chat = Chat(*loaded)
        chat.add_audio(str(clip))
        answers.append("".join(chat.ask(QUESTION)))
    assert answers == library_answers(loaded, clips)


def test_the_command_line_says_it(folder: Path, loaded: tuple[Any, Any], clips: list[Path]) -> None:
    results = [af3("ask", clip, QUESTION, "--model", folder, "-q") for clip in clips]
    assert [result.exit_code for result in results] == [0] * len(clips), results[0].output
    expected = library_answers(loaded, clips)
    assert [result.stdout.strip() for result in results] == [answer.strip() for answer in expected]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_the_server_says_it(
    server: RunningServer, loaded: tuple[Any, Any], clips: list[Path], is_streamed: bool
) -> None:
    answers = []
    with server.client() as client:
        for clip in clips:
            body = chat_body(audio_part(clip.read_bytes()), QUESTION, max_tokens=NUM_NEW, stream=is_streamed)
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            if is_streamed:
                parts = [choice["delta"].get("content") for e in events(reply) for choice in e["choices"]]
                answers.append("".join(filter(None, parts)))
            else:
                answers.append(reply.json()["choices"][0]["message"]["content"])
    assert answers == library_answers(loaded, clips)


def test_an_evaluation_says_it(loaded: tuple[Any, Any], clips: list[Path], tmp_path: Path) -> None:
    lines = []
    for clip in clips:
        answer = {"role": "assistant", "content": [{"type": "text", "text": "something"}]}
        lines.append(json.dumps({"id": clip.stem, "messages": [*conversation(clip), answer]}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    result = evaluate(*loaded, tmp_path / "data.jsonl", max_new_tokens=NUM_NEW)
    assert [item.answer for item in result.items] == library_answers(loaded, clips)


OPTIONS = {"max_new_tokens": NUM_NEW, "use_vad": False}


def library_transcripts(loaded: tuple[Any, Any], clips: list[Path]) -> list[str]:
    texts = []
    for clip in clips:
        segments = transcribe(*loaded, str(clip), **OPTIONS)
        texts.append(" ".join(" ".join(segment.text.split()) for segment in segments))
    return texts


def test_a_transcript_is_the_answer_to_the_transcription_request(
    loaded: tuple[Any, Any], clips: list[Path]
) -> None:
    model, processor = loaded
    batch = processor.apply_transcription_request([str(clip) for clip in clips])
    output = model.generate(**batch, max_new_tokens=NUM_NEW)[:, batch["input_ids"].shape[1] :]
    texts = processor.decode(output, skip_special_tokens=True, strip_prefix=True)
    assert [" ".join(text.split()) for text in texts] == library_transcripts(loaded, clips)


def test_the_command_line_transcribes_alike(
    folder: Path, loaded: tuple[Any, Any], clips: list[Path], tmp_path: Path
) -> None:
    flags = ["--max-new-tokens", NUM_NEW, "--no-vad"]
    result = af3("transcribe", *clips, "--model", folder, "-o", tmp_path, "-f", "json", *flags)
    assert result.exit_code == 0, result.output
    texts = [json.loads((tmp_path / f"{clip.stem}.json").read_text())["text"] for clip in clips]
    assert [" ".join(text.split()) for text in texts] == library_transcripts(loaded, clips)


def test_rays_workers_transcribe_alike(loaded: tuple[Any, Any], clips: list[Path]) -> None:
    files = [CorpusFile(clip.name, str(clip)) for clip in clips]
    records = transcribe_files(*loaded, files, TranscriptionOptions(**OPTIONS))
    texts = [" ".join(json.loads(record)["text"].split()) for record in records]
    assert texts == library_transcripts(loaded, clips)


@contextmanager
def same_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A form has no field for some options: their defaults are those of the other doors in this test."""
    from audioflamingo.server import transcription_form

    original = transcription_form.TranscriptionOptions
    monkeypatch.setattr(
        transcription_form, "TranscriptionOptions", lambda **fields: original(**{**OPTIONS, **fields})
    )
    yield


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_the_server_transcribes_alike(
    server: RunningServer,
    loaded: tuple[Any, Any],
    clips: list[Path],
    is_streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = []
    with same_options(monkeypatch), server.client() as client:
        for clip in clips:
            files = {"file": ("a.wav", clip.read_bytes(), "audio/wav")}
            form = {"model": "tiny", "stream": "true" if is_streamed else "false"}
            reply = client.post("/v1/audio/transcriptions", files=files, data=form)
            assert reply.status_code == 200, reply.text
            if is_streamed:
                texts.append("".join(event.get("delta", "") for event in events(reply)))
            else:
                texts.append(reply.json()["text"])
    assert texts == library_transcripts(loaded, clips)


def spoken(segments: list[Any]) -> list[tuple[float, float, str]]:
    return [(segment.start_s, segment.end_s, segment.text) for segment in segments]


def test_live_speech_is_transcribed_alike(loaded: tuple[Any, Any], clips: list[Path]) -> None:
    options = {**OPTIONS, "use_vad": True}
    for clip in clips:
        blocks = np.array_split(load_audio(clip), 25)
        events = list(listen(*loaded, blocks, draft_every_s=0.5, **options))
        heard = [event for event in events if isinstance(event, Segment)]
        assert heard
        assert spoken(heard) == spoken(list(transcribe(*loaded, str(clip), **options)))


def test_the_live_server_transcribes_alike(
    server: RunningServer, loaded: tuple[Any, Any], clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from audioflamingo.server import realtime_session

    options = {**OPTIONS, "use_vad": True}
    original = realtime_session.TranscriptionOptions
    monkeypatch.setattr(
        realtime_session, "TranscriptionOptions", lambda **fields: original(**{**options, **fields})
    )
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    sound: Any = {"format": {"type": "audio/pcm", "rate": SAMPLING_RATE}, "turn_detection": None}
    texts = []
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        connection.session.update(session={"type": "transcription", "audio": {"input": sound}})
        for clip in clips:
            data = soundfile.read(clip, dtype="int16")[0].tobytes()
            connection.input_audio_buffer.append(audio=base64.b64encode(data).decode())
            connection.input_audio_buffer.commit()
        while len(texts) < len(clips):
            event = connection.recv()
            assert event.type != "error", event
            if event.type == "conversation.item.input_audio_transcription.completed":
                texts.append(event.transcript)
    expected = [list(transcribe(*loaded, str(clip), **options)) for clip in clips]
    assert texts == [joined_text(segments) for segments in expected]
