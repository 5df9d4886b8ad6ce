"""What is shipped of several checkpoints of the built-in model is their mean."""

from __future__ import annotations

import torch

from recipes.nano.ship_model import load_mean
from tests.tiny_model import tiny_model


def test_the_weights_of_several_checkpoints_are_averaged(tmp_path):
    models = [tiny_model(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    mean = load_mean([tmp_path / str(number) for number in range(3)])
    expected = {
        name: torch.stack([dict(model.named_parameters())[name] for model in models]).mean(0)
        for name, _ in models[0].named_parameters()
    }
    for name, weight in mean.named_parameters():
        torch.testing.assert_close(weight, expected[name])
