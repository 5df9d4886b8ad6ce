"""The built-in model, and the recipe's packages where its programs find them: in their own folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from recipes.nano.nano_model.layout import WIDTH

sys.path.insert(0, str(Path(__file__).parents[3] / "recipes" / "nano"))


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    if model.config.text_config.hidden_size != WIDTH:
        pytest.skip("the weights that are shipped are not of this construction yet")
    return model.eval(), AutoProcessor.from_pretrained("nano")
