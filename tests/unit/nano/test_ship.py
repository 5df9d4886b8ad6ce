"""What is shipped of several checkpoints of the built-in model is their mean."""

from __future__ import annotations

import torch

from recipes.nano.ship_model import load_mean
from tests.support.tiny_model import tiny_model


def test_the_weights_of_several_checkpoints_are_averaged(tmp_path):
    models = [tiny_model(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    mean = load_mean([tmp_path / str(number) for number in range(3)])
    parameters = [model.parameters() for model in (mean, *models)]
    for averaged, *weights in zip(*parameters, strict=True):
        torch.testing.assert_close(averaged, torch.stack(weights).mean(0))
