"""Progress bars of training."""

from __future__ import annotations

import pytest

from audioflamingo.training.display import Bar, StageBar
from audioflamingo.training.learning_rate import Schedule
from audioflamingo.training.resume import Progress
from audioflamingo.training.training_config import StageConfig

VALUES = {"loss": 1.25, "learning_rates": {"projector": 1e-3}, "rows_per_s": 7.0}


def test_a_stage_shows_where_it_is_and_its_scores(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = Schedule.of(StageConfig({"projector": 1e-3}, max_steps=10), steps_per_epoch=10)
    with StageBar("first", schedule, is_shown=True) as bar:
        bar.update(Progress(step=5, stage_step=5, stage_s=10.0), VALUES)
        bar.show({"loss": 2.0, "wer": None})
    assert bar.done == 0.5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "validation: loss 2.0000\n" in captured.err
    assert "first" in captured.err
    assert "50%" in captured.err


def test_a_hidden_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("clips", 10, is_shown=False) as bar:
        bar.move(5, "half")
        bar.write("a line")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
