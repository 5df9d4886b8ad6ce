"""The folder of a run: two runs in one, data that changed, what was skipped, a full disk, rows that are too long."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from audioflamingo.errors import ConfigError, DataError, OutputError
from tests.support.tiny_training import config_values, conversation, write_clip, write_model, write_rows

pytest.importorskip("accelerate", reason="needs accelerate")

from audioflamingo.training import TrainingConfig, train
from audioflamingo.training.log import MetricsLog
from audioflamingo.training.resume import list_checkpoints
from audioflamingo.training.run_folder import RunFolder
from audioflamingo.training.settings import build
from audioflamingo.training.stage import StageRun


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    config_values(folder)
    return folder


def short(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    values = config_values(base, output_dir=str(base / name), **changes)
    values["stages"] = [{"learning_rates": {"projector": 1e-2}, "max_steps": 3}]
    values["data"]["validation"] = []
    return values


def run(values: dict[str, Any], **options: Any):
    return train(build(TrainingConfig, values), show_progress=False, **options)


def test_two_runs_in_one_folder(base: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    values = short(base, "locked")
    other = RunFolder(build(TrainingConfig, values), accelerate.Accelerator(cpu=True))
    other.open(fresh=False)
    with pytest.raises(ConfigError, match=r"another run is at work in '.*locked'"):
        run(values)
    other.close()
    assert run(values).step == 3


def test_an_output_folder_that_cannot_be_made(base: Path) -> None:
    in_the_way = base / "file"
    in_the_way.write_text("mine")
    for folder, reason in (
        (in_the_way, "File exists|Not a directory"),
        (in_the_way / "run", "Not a directory"),
    ):
        with pytest.raises(OutputError, match=f"cannot use the folder '{folder}': ({reason})"):
            run({**short(base, "x"), "output_dir": str(folder)})
    assert in_the_way.read_text() == "mine"


def test_data_that_changed_since_the_run_began(base: Path) -> None:
    data = base / "changing"
    data.mkdir()
    for number in range(4):
        write_clip(data / f"{number}.wav", 0.3, number)
    rows = [conversation(str(number), "hello", 0.3) for number in range(4)]
    path = write_rows(data / "train.jsonl", rows)
    values = short(base, "changed", data={"train": [{"path": str(path)}]}, batch={"max_rows": 1})
    values["data"] = {"train": [{"path": str(path)}]}
    run(values)
    write_rows(path, [conversation("0", "world", 0.3), *rows[1:]])
    with pytest.raises(ConfigError, match=r"train\.jsonl has changed since .* \(4 rows then, 4 now\)"):
        run(values)
    write_rows(path, rows)
    assert run(values).step == 3
    clip, copy = data / "2.wav", (data / "2.wav").read_bytes()
    write_clip(clip, 0.3, 77)  # of the same size
    with pytest.raises(ConfigError, match=r"2\.wav has changed since the run in .* began"):
        run(values)
    clip.write_bytes(copy)  # a copy is the same file
    assert run(values).step == 3
    write_rows(path, rows[:3])
    assert run(values, fresh=True).step == 3


def test_audio_that_changes_while_the_run_reads_it(base: Path, monkeypatch) -> None:
    data = base / "overwritten"
    data.mkdir()
    clips = [write_clip(data / f"{number}.wav", 0.3, number) for number in range(4)]
    path = write_rows(data / "train.jsonl", [conversation(str(number), "hello", 0.3) for number in range(4)])
    values = short(
        base, "overwriting", batch={"max_rows": 4, "batches_per_step": 1}, checkpoint_every_steps=1
    )
    values["data"] = {"train": [{"path": str(path)}]}
    step = StageRun._step

    def change_then_step(stage: StageRun, batches: Any, waited_s: float) -> dict[str, Any]:
        if stage.progress.step == 1:
            write_clip(clips[3], 0.3, 99)
        return step(stage, batches, waited_s)

    monkeypatch.setattr(StageRun, "_step", change_then_step)
    with pytest.raises(
        DataError, match=r"3\.wav has changed since the run began\. Put it back, or start again\."
    ):
        run(values)
    assert [path.name for path in list_checkpoints(base / "overwriting/checkpoints")] == [
        "step-000000001",
        "step-000000002",
    ]


def test_validation_audio_that_changes_while_the_run_goes_on(base: Path, monkeypatch) -> None:
    """It was read as it came: losses of other audio stood in one curve. A clip that is only touched stays."""
    data = base / "validated"
    data.mkdir()
    clips = [write_clip(data / f"{number}.wav", 0.3, number) for number in range(2)]
    path = write_rows(data / "valid.jsonl", [conversation(str(number), "hello", 0.3) for number in range(2)])
    values = short(base, "validating")
    values["data"]["validation"] = [{"path": str(path)}]
    values["validation"] = {"every_steps": 1, "generate_rows": 0}
    step, seeds = StageRun._step, iter([1, 99])

    def change_then_step(stage: StageRun, batches: Any, waited_s: float) -> dict[str, Any]:
        write_clip(clips[1], 0.3, next(seeds))  # first the same once more
        return step(stage, batches, waited_s)

    monkeypatch.setattr(StageRun, "_step", change_then_step)
    with pytest.raises(DataError, match=r"1\.wav has changed since the run began"):
        run(values)
    assert next(seeds, None) is None


def test_what_was_skipped_is_written_with_its_reason(base: Path, caplog) -> None:
    path = write_rows(
        base / "data" / "partly.jsonl",
        [
            json.loads((base / "data" / "train.jsonl").read_text().splitlines()[0]),
            conversation("gone", "x", 1.0),
        ],
    )
    values = short(base, "partly", batch={"max_rows": 1})
    values["data"] = {"train": [{"path": str(path)}], "on_bad_row": "skip"}
    train(build(TrainingConfig, values), show_progress=True)
    (line,) = (base / "partly" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    item = json.loads(line)
    assert item["place"] == f"{path}:2"
    assert "gone.wav" in item["reason"]
    assert "1 rows left out (1 there is no audio file)" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672]"), "the disk took only a part of it"),
    ],
)
def test_a_full_disk_leaves_the_checkpoints_before(
    base: Path, monkeypatch, error: Exception, reason: str
) -> None:
    values = short(base, f"full-{type(error).__name__}", checkpoint_every_steps=1)
    from audioflamingo.training import resume

    save, calls = resume.torch.save, []

    def failing(value: Any, file: Any) -> None:
        calls.append(file)
        if len(calls) > 3:  # random state and tensors of the first, then the random state of the second
            raise error
        save(value, file)

    monkeypatch.setattr(resume.torch, "save", failing)
    with pytest.raises(OutputError, match=f"cannot be written: {reason}; those before it are whole"):
        run(values)
    monkeypatch.undo()
    folder = Path(values["output_dir"]) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000000001"]
    assert run(values).step == 3
    assert list_checkpoints(folder)


@pytest.mark.parametrize("num_files", range(3))
def test_a_disk_that_is_full_at_any_file_of_a_checkpoint(base: Path, monkeypatch, num_files: int) -> None:
    """Random state, tensors, and where the run is: the last one gave the system's words, with a half-made folder."""
    values = short(base, f"full-at-{num_files}", checkpoint_every_steps=1)
    from audioflamingo.training import resume

    sync, calls = resume.os.fsync, []

    def failing(descriptor: int) -> None:
        if "/.step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(descriptor)
            if len(calls) > 3 + num_files:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(resume.os, "fsync", failing)
    with pytest.raises(
        OutputError, match="cannot be written: No space left on device; those before it are whole"
    ):
        run(values)
    monkeypatch.undo()
    folder = Path(values["output_dir"]) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000000001"]
    assert run(values).step == 3


def test_a_full_disk_at_the_log(base: Path, monkeypatch) -> None:
    values = short(base, "full-log", checkpoint_every_steps=1)
    write, calls = MetricsLog.write, []

    def failing(log: MetricsLog, *line: Any) -> None:
        calls.append(line)
        if len(calls) == 2:
            monkeypatch.setattr(log, "path", Path("/dev/full"))
        write(log, *line)

    monkeypatch.setattr(MetricsLog, "write", failing)
    with pytest.raises(
        OutputError, match=r"cannot write to '/dev/full': No space left on device\. Make room"
    ):
        run(values)
    monkeypatch.undo()
    assert run(values).step == 3


def test_a_row_longer_than_the_context(base: Path) -> None:
    write_model(base / "narrow", max_position_embeddings=200)
    long = conversation("train-0", "hello " * 400, 0.5)
    good = json.loads((base / "data" / "train.jsonl").read_text().splitlines()[1])
    path = write_rows(base / "data" / "long.jsonl", [long, good])
    values = short(base, "long", model=str(base / "narrow"), batch={"max_rows": 1})
    values["data"] = {"train": [{"path": str(path)}]}
    with pytest.raises(
        DataError, match=r"long\.jsonl:1: \d+ tokens, more than the 200 of the model's context"
    ):
        run(values)
    values["data"]["on_bad_row"] = "skip"
    assert run(values).step == 3
    assert "more than the 200" in (base / "long" / "skipped.jsonl").read_text(encoding="utf-8")
