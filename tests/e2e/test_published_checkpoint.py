"""The published checkpoint transcribes a human recording. Needs its 16.5 GB: set AF3_CHECKPOINT to the folder."""

from __future__ import annotations

import os

import pytest

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from tests.e2e.conftest import DATA

CHECKPOINT = os.environ.get("AF3_CHECKPOINT")


@pytest.mark.checkpoint
@pytest.mark.skipif(
    CHECKPOINT is None, reason="needs the published checkpoint: set AF3_CHECKPOINT to its folder"
)
def test_it_transcribes_a_human_recording() -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(CHECKPOINT, device_map="auto")
    inputs = processor.apply_transcription_request(audio=DATA / "directory_prompt.flac")
    inputs = inputs.to(model.device, dtype=model.dtype)
    outputs = model.generate(**inputs, max_new_tokens=100)
    (text,) = processor.decode(
        outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True, strip_prefix=True
    )
    assert "directory" in text.lower()
    assert "last name" in text.lower()
