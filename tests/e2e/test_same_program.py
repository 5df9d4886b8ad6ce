"""One program, two import lines: ours and transformers', on the same folder and recordings, say the same.

The programs are the documented uses of Audio Flamingo 3: audio with text, several turns, text only, audio only, a
batch, the transcription shortcut, and training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SPEECH = {"type": "audio", "path": "AUDIO_URL/directory_prompt.flac"}
ANIMALS = {"type": "audio", "path": "AUDIO_URL/monkeys.ogg"}
LONG = {"type": "audio", "path": "AUDIO_URL/congratulations_prompt.ogg"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}


CONVERSATIONS: dict[str, Any] = {
    "audio and text": [user(text("Transcribe the input speech."), SPEECH)],
    "more than a window": [user(text("Transcribe the input speech."), LONG)],
    "multi-turn": [
        user(text("How does the tone change? (A) Sad to happy (B) Happy to sad."), SPEECH),
        assistant("(A) Sad to happy"),
        user(text("Why do you think so?")),
    ],
    "text only": [user(text("What is the capital of France?"))],
    "audio only": [user(ANIMALS)],
    "batch": [
        [user(text("Transcribe the input speech."), SPEECH)],
        [user(text("What makes it feel so calm?"), ANIMALS)],
    ],
}

LOAD = """
from {package} import AudioFlamingo3ForConditionalGeneration, AutoProcessor

processor = AutoProcessor.from_pretrained(model_id)
model = AudioFlamingo3ForConditionalGeneration.from_pretrained(model_id, device_map="auto")
"""

GENERATE = """
inputs = processor.apply_chat_template(
    conversation,
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
).to(model.device, dtype=model.dtype)
outputs = model.generate(**inputs, max_new_tokens=25)
decoded_outputs = processor.decode(outputs[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
"""

TRANSCRIBE = """
inputs = processor.apply_transcription_request(audio=audio).to(model.device, dtype=model.dtype)
outputs = model.generate(**inputs, max_new_tokens=25)
decoded_outputs = processor.decode(
    outputs[:, inputs.input_ids.shape[1]:], skip_special_tokens=True, strip_prefix=True
)
"""

TRAIN = """
model.train()
inputs = processor.apply_chat_template(
    conversation,
    tokenize=True,
    add_generation_prompt=True,
    return_dict=True,
    output_labels=True,
).to(model.device, dtype=model.dtype)
loss = model(**inputs).loss
loss.backward()
"""


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Names after the import and load lines, for each package."""
    spaces = {}
    for package in ("audioflamingo", "transformers"):
        spaces[package] = {"model_id": str(checkpoint)}
        exec(LOAD.format(package=package), spaces[package])
    return spaces


def run(
    program: str, loaded: dict[str, dict[str, Any]], **names: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    results = []
    for package in ("audioflamingo", "transformers"):
        space = loaded[package] | names
        exec(program, space)
        results.append(space)
    return results[0], results[1]


def with_url(value: Any, url: str) -> Any:
    if isinstance(value, str):
        return value.replace("AUDIO_URL", url)
    if isinstance(value, dict):
        return {key: with_url(item, url) for key, item in value.items()}
    return [with_url(item, url) for item in value]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name: str, loaded: dict[str, dict[str, Any]], audio_url: str) -> None:
    ours, theirs = run(GENERATE, loaded, conversation=with_url(CONVERSATIONS[name], audio_url))
    assert set(ours["inputs"]) == set(theirs["inputs"])
    assert ours["outputs"].tolist() == theirs["outputs"].tolist()
    assert ours["decoded_outputs"] == theirs["decoded_outputs"]


def test_transcription_shortcut(loaded: dict[str, dict[str, Any]], audio_url: str) -> None:
    ours, theirs = run(TRANSCRIBE, loaded, audio=f"{audio_url}/directory_prompt.flac")
    assert ours["outputs"].tolist() == theirs["outputs"].tolist()
    assert len(ours["decoded_outputs"]) == len(theirs["decoded_outputs"]) == 1


def test_training(loaded: dict[str, dict[str, Any]], audio_url: str) -> None:
    # A lossless recording: the two packages decode Opus with different libraries, which gradients show.
    questions = ("Transcribe the input speech.", "What makes this track feel so calming and meditative?")
    answer = assistant("The transcription of the audio is 'hello world'.")
    conversation = [[user(text(question), SPEECH), answer] for question in questions]
    ours, theirs = run(TRAIN, loaded, conversation=with_url(conversation, audio_url))
    assert ours["inputs"]["labels"].tolist() == theirs["inputs"]["labels"].tolist()
    assert abs(ours["loss"].item() - theirs["loss"].item()) < 1e-4
    reference = dict(theirs["model"].named_parameters())
    for parameter_name, parameter in ours["model"].named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - reference[parameter_name].grad).abs().max() < 1e-4, parameter_name
