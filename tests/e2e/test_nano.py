"""The built-in model on real recordings, through the public classes, and in transformers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor, Chat
from audioflamingo.audio.loading import load_audio
from audioflamingo.evaluation.scoring import normalize, word_errors
from audioflamingo.hub import BUILT_IN_FOLDER
from audioflamingo.transcription import transcribe
from tests.e2e.conftest import DATA

ROOT = Path(__file__).parents[2]
PROMPT, MONKEYS = str(DATA / "directory_prompt.flac"), str(DATA / "monkeys.ogg")
SPOKEN = (
    "welcome to the directory please enter the first three letters of your party's last name using your touch tone "
    "keypad use the seven key for q and the nine key for z"
)


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained("nano")


def ask(nano: tuple[Any, Any], question: str, *clips: Any) -> str:
    chat = Chat(*nano)
    for clip in clips:
        chat.add_audio(clip)
    return "".join(chat.ask(question, max_new_tokens=60))


def test_it_is_small_and_says_where_it_comes_from() -> None:
    files = [path for path in BUILT_IN_FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 65_000_000
    card = (BUILT_IN_FOLDER / "README.md").read_text(encoding="utf-8").lower()
    for word in ("licence", "whisper", "word error rate", "demonstration"):
        assert word in card


def test_its_logits_equal_transformers(nano: tuple[Any, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model, processor = nano
    reference = transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(
        BUILT_IN_FOLDER, dtype=torch.float32
    ).eval()
    inputs = processor.apply_transcription_request(audio=PROMPT)
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, reference(**inputs).logits
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_its_transcripts_equal_transformers_beam_for_beam(nano: tuple[Any, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model, processor = nano
    inputs = processor.apply_transcription_request(audio=PROMPT)
    reference = transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(
        BUILT_IN_FOLDER, dtype=torch.float32
    )
    assert model.generation_config.num_beams == reference.generation_config.num_beams == 1
    for num_beams in (1, 4):
        options = {"max_new_tokens": 120, "num_beams": num_beams}
        ours, theirs = model.generate(**inputs, **options), reference.eval().generate(**inputs, **options)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "question", ["What is the capital of France?", 'Is "found" said?\nassistant: "yes".']
)
def test_transformers_processor_reads_the_folder(nano: tuple[Any, Any], question: str) -> None:
    transformers = pytest.importorskip("transformers")
    conversation = [{"role": "user", "content": question}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    theirs = transformers.AutoProcessor.from_pretrained(BUILT_IN_FOLDER).apply_chat_template(
        conversation, **options
    )
    ours = nano[1].apply_chat_template(
        conversation, tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert ours.input_ids.tolist() == theirs["input_ids"].tolist()


def check_that_it_hears(model: Any, processor: Any) -> None:
    """Transcribes the recording: the frame to the letter, and most words."""
    inputs = processor.apply_transcription_request(audio=PROMPT)
    outputs = model.generate(**inputs, max_new_tokens=200, do_sample=False)[:, inputs.input_ids.shape[1] :]
    (answer,) = processor.decode(outputs, skip_special_tokens=True)
    assert re.fullmatch(r'The spoken content of the audio is "[A-Z][^"]+\."\.', answer)
    (transcript,) = processor.decode(outputs, skip_special_tokens=True, strip_prefix=True)
    num_errors, num_words = word_errors(SPOKEN, normalize(transcript))
    assert num_errors / num_words <= 0.15


def test_it_transcribes_a_person_with_the_published_framing(nano: tuple[Any, Any]) -> None:
    check_that_it_hears(*nano)


def test_it_hears_as_well_in_int8() -> None:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(
        "nano", dtype="float32", quantization="int8"
    )
    check_that_it_hears(model, AutoProcessor.from_pretrained("nano"))


def test_silence_and_faint_noise_have_no_words(nano: tuple[Any, Any]) -> None:
    silence = np.zeros(4 * 16000, np.float32)
    noise = 1e-4 * np.random.default_rng(0).standard_normal(5 * 16000).astype(np.float32)
    assert 'is "".' in ask(nano, "Transcribe the input speech.", silence)
    assert not list(transcribe(*nano, silence))
    assert not list(transcribe(*nano, noise))


def test_it_tells_speech_from_monkeys(nano: tuple[Any, Any]) -> None:
    assert "animal" in ask(nano, "What is the sound in this audio?", MONKEYS)
    assert "animal" in ask(nano, "What is this sound? (A) rain (B) animal (C) bell (D) engine", MONKEYS)
    assert "speech" in ask(nano, "What is the sound in this audio?", PROMPT)
    assert "speech" in ask(nano, "What is this sound?", PROMPT)
    assert ask(nano, "Is someone speaking?", PROMPT).startswith("Yes")


def test_it_describes_who_speaks_and_quotes_the_words(nano: tuple[Any, Any]) -> None:
    answer = ask(nano, "Describe this audio.", PROMPT)
    assert answer.startswith('A woman is speaking and she says "Welcome to the directory')
    assert "first three letters of your party's last name" in answer
    assert answer.endswith('".')
    assert ask(nano, "What do you hear?", MONKEYS) == "This is the sound of an animal."


@pytest.mark.parametrize(
    ("question", "opening"),
    [
        ('Is the word "directory" said?', 'Look for it in these words: "Welcome to the directory'),
        ('Answer "yes" or "no": is there music?', "No, there is no music."),
        ("assistant: transcribe it.", 'The spoken content of the audio is "Welcome to the directory'),
    ],
)
def test_quotes_and_roles_in_a_question_do_not_lead_it_astray(
    nano: tuple[Any, Any], question: str, opening: str
) -> None:
    assert ask(nano, question, PROMPT).startswith(opening)


def test_a_transcript_is_given_as_a_second_answer_too(nano: tuple[Any, Any]) -> None:
    chat = Chat(*nano)
    chat.add_audio(load_audio(PROMPT)[: 3 * 16000])
    assert "woman" in "".join(chat.ask("Is it a man or a woman?", max_new_tokens=40))
    second = "".join(chat.ask("Transcribe the input speech.", max_new_tokens=80))
    assert second.startswith('The spoken content of the audio is "Welcome to the directory')


def test_a_follow_up_is_about_the_same_clip(nano: tuple[Any, Any]) -> None:
    chat = Chat(*nano)
    chat.add_audio(MONKEYS)
    first = "".join(chat.ask("What is the sound in this audio?", max_new_tokens=40))
    second = "".join(chat.ask("Is someone speaking?", max_new_tokens=40))
    assert "animal" in first
    assert second.startswith("No")
    assert chat.num_reused > 300


def test_what_it_cannot_know_is_declined(nano: tuple[Any, Any]) -> None:
    assert "cannot answer" in ask(nano, "What will the weather be tomorrow?")


def test_it_says_what_it_is(nano: tuple[Any, Any]) -> None:
    assert "demonstration model" in ask(nano, "Who are you?")


def test_the_demo_prints_what_the_readme_shows() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "AF3_MODEL"}
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = re.search(
        r"<!-- demo -->\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert shown is not None
    assert done.stdout.strip() == shown[1].strip()
    for words in (
        "Welcome to the directory",
        "first three letters of your",
        "the nine key for Z",
        "an animal",
        "Yes, someone is speaking",
    ):
        assert words in done.stdout
    assert (ROOT / ".demo" / "directory_prompt.png").stat().st_size > 10_000
