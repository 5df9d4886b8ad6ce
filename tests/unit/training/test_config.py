"""The YAML config: every key checked, and the examples in recipes/ are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from audioflamingo.errors import ConfigError
from audioflamingo.training.learning_rate import Schedule
from audioflamingo.training.settings import build
from audioflamingo.training.training_config import StageConfig, TrainingConfig, load_config

pytest.importorskip("yaml", reason="needs pyyaml")
RECIPES = Path(__file__).parents[3] / "recipes"
MINIMAL = """
model: m
output_dir: out
data: {train: [{path: a.jsonl}]}
stages: [{learning_rates: {projector: 1e-3}, max_steps: 10}]
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TrainingConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_defaults_numbers_and_overrides(tmp_path: Path, monkeypatch) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.stages[0].learning_rates == {"projector": 1e-3}  # YAML reads 1e-3 as text
    assert config.batch.batches_per_step == 1
    changed = load(tmp_path, MINIMAL, "stages.0.max_steps=20", "augmentation.spec.time_masks=2", "seed=4")
    assert (changed.stages[0].max_steps, changed.augmentation.spec.time_masks, changed.seed) == (20, 2, 4)
    assert build(TrainingConfig, changed.to_dict()) == changed
    monkeypatch.setenv("AF3_TEST_FOLDER", "/data")
    assert load(tmp_path, MINIMAL.replace("a.jsonl", "${AF3_TEST_FOLDER}/a")).data.train[0].path == "/data/a"
    assert load(tmp_path, MINIMAL.replace("a.jsonl", "${AF3_NONE:-/x}/a")).data.train[0].path == "/x/a"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("output_dir", "ouput_dir", "'ouput_dir'.*did you mean 'output_dir'"),
        ("max_steps", "max_step", "stages.0.*'max_step'.*'max_steps'"),
        ("output_dir: out", "", "needs the key 'output_dir'"),
        ("max_steps: 10", "max_steps: ten", "max_steps must be a whole number"),
        ("max_steps: 10", "name: x", "max_steps, max_epochs or max_minutes"),
        ("projector", "projektor", "no part 'projektor'"),
        ("1e-3", "0", "must be above 0"),
        ("model: m", "model: m\nprecision: int8", "must be one of"),
        ("model: m", "model: m\nbatch: {max_rows: 0}", "max_rows must be at least 1"),
        ("model: m", "model: m\naugmentation: {noise_probability: 1}", "needs noise_folder"),
        ("model: m", "model: m\naugmentation: {speed: [1.0]}", "list of 2 values"),
        ("max_steps: 10", "max_steps: 10, ctc_layer: -1", "ctc_layer must not be negative"),
        ("max_steps: 10", "max_steps: 10, encoder_last_layers: 2", "encoder_last_layers needs a rate"),
        ("projector: 1e-3}", "encoder: 1}, encoder_last_layers: 0", "encoder_last_layers must be at least 1"),
        ("model: m", "model: m\nlora: {target_modules: []}", "lora: target_modules must name at least one"),
        ("model: m", "model: m\nlora: {rank: 0}", "lora: rank must be at least 1"),
        ("model: m", "model: m\nlora: {dropout: 1}", "lora: dropout must be from 0 to below 1"),
        (
            "max_steps: 10",
            "max_steps: 10, ctc_weight: 1, answer_weight: 0, ctc_layer: 1",
            "ctc_layer needs answer_weight",
        ),
        ("a.jsonl", "${AF3_UNSET_VARIABLE}", "AF3_UNSET_VARIABLE is not set"),
        ("model: m", "model: [", "cannot read"),
        ("{projector: 1e-3}", "{language_model: 1}", None),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    text = MINIMAL.replace(old, new)
    if message is None:
        load(tmp_path, text)
        return
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_stage_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rates must name at least one of encoder, projector"):
        load(tmp_path, MINIMAL.replace("{projector: 1e-3}", "{}"))


def test_lora_and_full_training_exclude_each_other(tmp_path: Path) -> None:
    stages = "stages: [{learning_rates: {lora: 1e-3, language_model: 1e-3}, max_steps: 1}]"
    with pytest.raises(ConfigError, match="either language_model or lora"):
        load(tmp_path, MINIMAL[: MINIMAL.index("stages")] + stages)


@pytest.mark.parametrize("override", ["stages.9.max_steps=1", "nonsense", "model.x=1"])
def test_odd_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load(tmp_path, MINIMAL, override)


@pytest.mark.parametrize("name", ["stages.yaml", "lora.yaml"])
def test_the_examples_are_valid(name: str, monkeypatch) -> None:
    for name_of in ("NANO_DATA", "MODEL"):
        monkeypatch.setenv(name_of, "/data")
    assert load_config(RECIPES / name).stages


def test_warm_up_cosine_and_ends() -> None:
    stage = StageConfig({"projector": 1e-3}, max_steps=100, warmup_steps=10, final_rate=0.1)
    schedule = Schedule.of(stage, steps_per_epoch=30)
    factors = [schedule.rate_factor(step, 0.0) for step in range(100)]
    assert factors[0] == pytest.approx(0.1, rel=1e-2)
    assert max(factors) == factors[9]
    assert factors[99] == pytest.approx(0.1, abs=0.01)
    assert [schedule.is_over(step, 1e9) for step in (99, 100)] == [False, True]
    by_epochs = Schedule.of(StageConfig({"projector": 1e-3}, max_epochs=1.5, max_minutes=1), 30)
    assert by_epochs.num_steps == 45
    assert by_epochs.is_over(1, 60.0)
    by_clock = Schedule.of(StageConfig({"projector": 1e-3}, max_minutes=2), 30)
    assert by_clock.rate_factor(5, 60.0) == pytest.approx(0.5)
    assert by_clock.seconds_left(5, 60.0) == 60.0
    assert not by_clock.is_over(5, 119.9)
    constant = Schedule.of(StageConfig({"projector": 1e-3}, max_steps=10, schedule="constant"), 30)
    assert constant.rate_factor(9, 0.0) == 1.0


def test_the_time_left_is_told_by_steps_or_by_the_clock() -> None:
    schedule = Schedule.of(StageConfig({"projector": 1e-3}, max_steps=10), 30)
    assert schedule.seconds_left(0, 0.0) is None
    assert schedule.seconds_left(1, 3.0) == 27.0
    assert schedule.seconds_left(4, 8.0) == 12.0
    assert schedule.seconds_left(11, 22.0) == 0.0
    both = Schedule.of(StageConfig({"projector": 1e-3}, max_steps=10, max_minutes=1), 30)
    assert both.seconds_left(4, 58.0) == 2.0
    assert Schedule.of(StageConfig({"projector": 1e-3}, max_epochs=0.01), 30).num_steps == 1
