"""Whole runs: learning, resuming after SIGKILL, two processes, LoRA, NaN, stages with a cache."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audioflamingo.errors import ConfigError, TrainingError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.tiny_training import config_values, write_clip, write_dataset

pytest.importorskip("accelerate", reason="needs accelerate")

from audioflamingo.training import NonFiniteLossError, train
from audioflamingo.training.log import read_log
from audioflamingo.training.resume import list_checkpoints, read_state
from audioflamingo.training.settings import build
from audioflamingo.training.training_config import TrainingConfig


def run(values, **options):
    return train(build(TrainingConfig, values), show_progress=False, **options)


def losses(folder: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_log(folder / "log.jsonl") if e["kind"] == "train"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    config_values(folder)
    return folder


def test_a_run_learns_and_leaves_models_logs_and_curves(base: Path) -> None:
    values = config_values(base, output_dir=str(base / "plain"), tensorboard=True, save_dtype="float16")
    values["stages"][0] |= {"max_steps": 30, "warmup_steps": 3}
    values["validation"]["every_steps"] = 10
    result = run(values)
    curve = losses(base / "plain")
    assert list(curve) == list(range(1, 31))
    assert curve[30] < 0.8 * curve[1]
    validations = [e for e in read_log(base / "plain" / "log.jsonl") if e["kind"] == "validation"]
    assert [e["step"] for e in validations] == [10, 20, 30]
    assert result.best == min(e["loss"] for e in validations)
    assert all(e["wer"] >= 0 for e in validations)
    for folder in (result.best_dir, result.last_dir):
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
        assert model.dtype == torch.float16
        AudioFlamingo3Processor.from_pretrained(folder)
    assert (base / "plain" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((base / "plain" / "tensorboard").glob("events*"))
    before = load_file(base / "model" / "model.safetensors")
    after = load_file(result.last_dir / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name].half(), after[name])}
    assert changed == {"multi_modal_projector", "language_model"}


def test_a_finished_run_is_not_repeated_and_another_config_is_refused(base: Path) -> None:
    values = config_values(base, output_dir=str(base / "finished"))
    values["stages"][0]["max_steps"] = 2
    first = run(values)
    assert run(values) == first
    assert len(losses(base / "finished")) == 2
    with pytest.raises(ConfigError, match="different: seed"):
        run({**values, "seed": 5})
    assert run({**values, "seed": 5}, fresh=True).step == 2


def test_fewer_steps_than_the_log_interval(base: Path) -> None:
    """The run ended in an error over its log, which had no line yet, and so did each run after it."""
    values = config_values(base, output_dir=str(base / "short"), log_every_steps=10)
    values["data"]["validation"] = []
    values["stages"] = [{"learning_rates": {"projector": 1e-2}, "max_steps": 2}] * 2
    assert run(values).step == 4
    assert list(losses(base / "short")) == [2, 4]  # the last step of each stage
    assert (base / "short" / "curves.png").exists()
    for name in ("log.jsonl", "curves.png"):
        (base / "short" / name).unlink()
    assert run(values).step == 4
    assert not (base / "short" / "curves.png").exists()


def test_killed_in_the_middle_and_resumed_gives_the_same_losses(base: Path) -> None:
    """The model has dropout, so the random state counts too."""
    values = config_values(base, checkpoint_every_steps=7)
    values["stages"] = [
        {"learning_rates": {"projector": 1e-2}, "max_steps": 4, "ctc_weight": 0.5},
        {"learning_rates": {"projector": 1e-2, "language_model": 3e-3}, "max_steps": 40, "ctc_weight": 0.5},
    ]
    values["augmentation"] = {"gain_probability": 0.5, "speed_probability": 0.5, "spec": {"time_masks": 1}}
    run({**values, "output_dir": str(base / "whole")})
    folder = base / "killed"
    config_file = base / "killed.json"  # JSON is YAML
    config_file.write_text(json.dumps({**values, "output_dir": str(folder)}), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "audioflamingo.cli", "train", str(config_file), "--quiet"], env=environment()
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "log.jsonl").exists() and len(losses(folder)) >= 21:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (folder / "checkpoints" / ".step-000000099.tmp").mkdir()  # what a kill while writing leaves
    progress, _ = read_state(list_checkpoints(folder / "checkpoints")[-1])
    assert progress.stage == 1
    assert 0 < progress.stage_step < 40
    run({**values, "output_dir": str(folder)})
    assert losses(folder) == losses(base / "whole")
    whole, resumed = (load_file(base / name / "last" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **more}


def test_two_processes_give_the_losses_of_one(base: Path) -> None:
    """Batches of unequal numbers of labels, text-only ones among them, spread over gloo processes."""
    values = config_values(base)
    write_plain_model(base)
    values |= {"model": str(base / "plain-model"), "seed": 3}
    values["stages"][0] |= {"ctc_weight": 0.3, "max_steps": 5}
    values["feature_cache"] = {"folder": str(base / "shared-cache"), "shard_clips": 3}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = base / "two"
    config_file = base / "two.json"
    config_file.write_text(json.dumps({**values, "output_dir": str(folder)}), encoding="utf-8")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "audioflamingo.cli", "train", str(config_file), "--quiet"],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    run({**values, "output_dir": str(base / "one")})
    one, two = losses(base / "one"), losses(folder)
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    assert two == pytest.approx(one, rel=1e-4)
    validations = [
        next(e for e in read_log(base / name / "log.jsonl") if e["kind"] == "validation")
        for name in ("one", "two")
    ]
    assert validations[1]["loss"] == pytest.approx(validations[0]["loss"], rel=1e-4)


def write_plain_model(base: Path) -> None:
    from tests.support.tiny_training import write_model

    if not (base / "plain-model").exists():
        write_model(base / "plain-model")


def test_lora_saves_an_adapter_and_leaves_the_base_alone(base: Path) -> None:
    """P6, P8: the adapter loads into a fresh base, and the merged model equals it."""
    peft = pytest.importorskip("peft", reason="needs peft")
    values = config_values(base, output_dir=str(base / "lora"), lora={"rank": 4, "alpha": 8, "merge": True})
    values["stages"] = [{"learning_rates": {"lora": 1e-2}, "max_steps": 4}]
    result = run(values)
    fresh = AudioFlamingo3ForConditionalGeneration.from_pretrained(base / "model")
    merged = AudioFlamingo3ForConditionalGeneration.from_pretrained(result.last_dir)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        plain = fresh(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(fresh, result.last_dir / "adapter")
        logits = adapted(input_ids=ids).logits
        assert (logits - plain).abs().max() > 1e-4
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids).logits, plain)
    log = read_log(base / "lora" / "log.jsonl")
    assert set(log[0]["learning_rates"]) == {"lora"}


def test_nan_names_the_rows_and_keeps_the_last_checkpoint(base: Path) -> None:
    values = config_values(base, output_dir=str(base / "nan"), checkpoint_every_steps=1)
    values["stages"][0] |= {
        "learning_rates": {"language_model": 1e20},
        "max_grad_norm": None,
        "max_steps": 20,
    }
    values["data"]["validation"] = []
    with pytest.raises(NonFiniteLossError, match="train-") as caught:
        run(values)
    assert caught.value.ids
    assert set(caught.value.ids) <= {f"train-{i}" for i in range(12)}
    last = list_checkpoints(base / "nan" / "checkpoints")[-1]
    assert read_state(last)[0].step == max(losses(base / "nan"))


def test_what_another_trainer_of_the_process_left_is_named(base: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    values = config_values(base, output_dir=str(tmp_path / "run"), precision="float32")
    with pytest.raises(TrainingError, match=r"'bf16' on cpu.*needs float32 on the CPU"):
        run(values)


def test_a_stage_limited_by_minutes_ends(base: Path) -> None:
    values = config_values(base, output_dir=str(base / "minutes"))
    values["stages"] = [{"learning_rates": {"projector": 1e-3}, "max_minutes": 0.01}]
    values["data"]["validation"] = []
    result = run(values)
    rates = [e["learning_rates"]["projector"] for e in read_log(base / "minutes" / "log.jsonl")]
    assert result.step == len(rates) > 1
    assert rates[-1] < rates[0]


def test_unreadable_audio_is_reported_with_file_and_line(base: Path, caplog) -> None:
    data = base / "broken"
    path = write_dataset(data, 8, "train.jsonl", seed=2)
    write_clip(data / "train-1.wav", 0.3, 0).write_bytes(b"this is no audio")
    values = config_values(base, output_dir=str(base / "skip"))
    values["data"] = {"train": [{"path": str(path)}], "on_bad_row": "skip"}
    values["stages"][0]["max_steps"] = 4
    values["batch"] = {"max_rows": 3}
    for cache in (None, {"folder": str(base / "skip-cache")}):
        caplog.clear()
        run({**values, "feature_cache": cache}, fresh=True)
        assert "train-1.wav" in caplog.text
    with pytest.raises(Exception, match=r"train\.jsonl:2: .*train-1\.wav"):
        run({**values, "data": {**values["data"], "on_bad_row": "error"}, "output_dir": str(base / "fatal")})


def test_batches_must_divide_over_processes_and_gradient_checkpointing_changes_nothing(base: Path) -> None:
    write_plain_model(base)
    curves = []
    for name, enabled in (("stored", False), ("recomputed", True)):
        values = config_values(base, output_dir=str(base / name), model=str(base / "plain-model"))
        values["stages"] = [{"learning_rates": {"encoder": 1e-4, "projector": 1e-3}, "max_steps": 3}]
        values["data"]["validation"] = []
        run({**values, "gradient_checkpointing": enabled})
        curves.append(losses(base / name))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_ctc_inside_the_language_model_trains_and_needs_that_layer(base: Path, tmp_path: Path) -> None:
    values = config_values(base, output_dir=str(tmp_path / "run"))
    values["data"]["train"][0]["answer_weight"] = 2.0
    values["stages"] = [
        {
            "learning_rates": {"projector": 1e-2, "language_model": 3e-3},
            "max_steps": 30,
            "ctc_weight": 0.5,
            "ctc_layer": 1,
        }
    ]
    run(values)
    curve = losses(tmp_path / "run")
    assert curve[30] < 0.8 * curve[1]
    values["stages"][0]["ctc_layer"] = 9
    with pytest.raises(ConfigError, match="ctc_layer 9 is more than the language model's 2 layers"):
        run({**values, "output_dir": str(tmp_path / "deep")})


def test_full_training_sharded_over_two_processes_has_the_losses_of_one(base: Path) -> None:
    """`recipes/full_fsdp.yaml` by `accelerate launch` with `recipes/fsdp.json`, but on gloo and the tiny model."""
    write_plain_model(base)
    recipe = Path(__file__).parents[3] / "recipes" / "full_fsdp.yaml"
    overrides = {
        "model": base / "plain-model", "precision": "float32", "device": "cpu", "save_dtype": "null",
        "data.train": f"[{{path: {base / 'data/train.jsonl'}}}]", "data.num_workers": 0, "tensorboard": "false",
        "data.validation": f"[{{path: {base / 'data/valid.jsonl'}}}]", "log_every_steps": 1,
        "stages.0.max_steps": 4, "stages.0.max_epochs": "null", "stages.0.warmup_steps": 1,
        "stages.0.learning_rates": "{encoder: 1e-3, projector: 1e-2, language_model: 3e-3}",
        "batch.max_rows": 3, "batch.batches_per_step": 2, "checkpoint_every_steps": 2,
    }  # fmt: skip

    def arguments(name: str) -> list[str]:
        values = {**overrides, "output_dir": base / name}
        settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        return ["train", str(recipe), *settings, "--quiet"]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(recipe.with_name("fsdp.json")), "--num_processes", "2"]
    launch += ["--main_process_port", port, "-m", "tests.support.fsdp_on_cpu"]
    sharded_run = subprocess.run(
        [*launch, *arguments("sharded")],
        env=environment(DATA=str(base / "data")),
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    assert sharded_run.returncode == 0, sharded_run.stderr[-3000:]
    alone = subprocess.run(
        [sys.executable, "-m", "audioflamingo.cli", *arguments("alone")],
        env=environment(DATA=str(base / "data")),
        check=False,
    )
    assert alone.returncode == 0
    one, sharded = losses(base / "alone"), losses(base / "sharded")
    assert list(one) == list(sharded) == [1, 2, 3, 4]
    assert sharded == pytest.approx(one, rel=1e-4)
    assert one[4] != pytest.approx(one[1], rel=1e-3)  # it has learned something that could differ
    weights = [load_file(base / name / "last/model.safetensors") for name in ("alone", "sharded")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=2e-4) for n in weights[0])
