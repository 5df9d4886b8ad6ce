"""Prompts that checkpoints were trained with, and the settings of their cards."""

from __future__ import annotations

import hashlib

import pytest

from audioflamingo.engine.generate_options import CHECKS
from audioflamingo.tasks import GENERATION_PRESETS, SYSTEM_PROMPTS, TASKS
from tests.support.cli_runs import af3

# SHA-256 of the published texts, the spelling mistake and the em dash included.
DIGESTS = {"music-flamingo": "ab6e1442bdda8615", "audio-flamingo-next": "892f3ca1ee01fff8"}


@pytest.mark.parametrize("name", DIGESTS)
def test_system_texts(name: str) -> None:
    assert hashlib.sha256(SYSTEM_PROMPTS[name].encode()).hexdigest().startswith(DIGESTS[name])


def test_prompts_to_the_letter() -> None:
    assert TASKS["transcribe"].prompt == "Transcribe the input speech."
    assert TASKS["lyrics"].prompt == "Generate a lyrics transcription from the input song."
    assert TASKS["speakers"].prompt.endswith("with speaker labels.\n[Speaker 1] ...\n[Speaker 2] ...")
    assert TASKS["caption-music"].prompt.startswith("Summarize the track with precision: mention its musical")


def test_presets_are_options_of_generate() -> None:
    for options in GENERATION_PRESETS.values():
        for option, value in options.items():
            assert CHECKS[option][0](value)
    assert GENERATION_PRESETS["audio-flamingo-next-think"] == {
        "repetition_penalty": 1.2,
        "max_new_tokens": 4096,
    }


def test_the_command_line_lists_them() -> None:
    result = af3("ask", "--tasks")
    assert result.exit_code == 0
    for name, task in TASKS.items():
        assert f"{name}  ({task.models})\n    {task.prompt}" in result.stdout
