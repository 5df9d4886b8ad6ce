"""Saving: what is written, what is refused, and saves that fail half way."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from audioflamingo import files as whole_files
from audioflamingo.checkpoint.saving import parse_size
from audioflamingo.errors import ArgumentError, AudioFlamingoError, CheckpointError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from tests.support.checkpoint_folders import INDEX, SINGLE, assert_equal_state, edit_json
from tests.support.tiny_model import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model, saved."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_shards_are_as_large_as_asked_and_indexed(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3
    sizes = {name: sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in files}
    biggest = max(tensor.nbytes for name in files for tensor in load_file(tmp_path / name).values())
    assert max(sizes.values()) <= max(100_000, biggest)
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert {name: file for file in files for name in load_file(tmp_path / file)} == index["weight_map"]
    assert_equal_state(Model.from_pretrained(tmp_path), tiny_model())


def test_unknown_configuration_keys_survive_and_dtype_is_todays(folder: Path, tmp_path: Path) -> None:
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(
        folder / "config.json", novel={"a": [1]}, text_config={**text_config, "dtype": "float32", "x": 1}
    )
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "novel": 2}))
    model = Model.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["novel"] == {"a": [1]}
    assert config["text_config"]["x"] == 1
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert config["architectures"] == ["AudioFlamingo3ForConditionalGeneration"]
    generation_config = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert (generation_config["temperature"], generation_config["novel"]) == (0.7, 2)
    assert_equal_state(Model.from_pretrained(tmp_path / "again"), model)


def test_float16_matrices_that_float8_holds_are_saved_in_it(tmp_path: Path) -> None:
    model = tiny_model().half()
    state = model.state_dict()
    exact, nearly = "model.language_model.embed_tokens.weight", "lm_head.weight"
    for name in (exact, nearly):
        state[name].copy_(state[name].to(torch.float8_e4m3fn))
    state[nearly][-1, -1] = 1.0625  # between two of float8's values
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / SINGLE)
    dtypes = {
        name: tensor.dtype for name, tensor in saved.items() if "embed_tokens" in name or "lm_head" in name
    }
    assert sorted(map(str, dtypes.values())) == ["torch.float16", "torch.float8_e4m3fn"]
    assert all(tensor.dtype == torch.float16 for tensor in saved.values() if tensor.ndim < 2)
    loaded = Model.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert_equal_state(loaded, model)


def test_shared_and_strided_weights_are_saved_whole(tmp_path: Path) -> None:
    model = tiny_model()
    embeddings = model.get_input_embeddings()
    model.lm_head.weight = embeddings.weight
    projection = model.model.multi_modal_projector.linear_2
    projection.weight = torch.nn.Parameter(projection.weight.detach().T)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert_equal_state(loaded, model)
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("20kb", 20_000), ("2T", 2 * 10**12)],
)
def test_sizes(text: int | str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-5GB", 0, -1, True, 2.5, None])
def test_wrong_sizes(size: Any) -> None:
    with pytest.raises(ArgumentError, match="max_shard_size"):
        parse_size(size)


def test_saving_over_the_folder_that_the_model_is_mapped_from(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("keep")
    model = Model.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for size in ("5GB", "100KB", "5GB", "50KB", "100KB"):
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / SINGLE).exists() == (size == "5GB")
        assert (folder / INDEX).exists() == (size != "5GB")
        model = Model.from_pretrained(folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    indexed = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    kept = {"config.json", "generation_config.json", "tokenizer.json", INDEX}
    assert set(os.listdir(folder)) == indexed | kept


def test_unwritable_targets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        model.save_pretrained(folder / "config.json")
    with pytest.raises(CheckpointError, match="cannot save to"):
        model.save_pretrained(folder / "config.json" / "below")
    with pytest.raises(ArgumentError, match="folder must be a path"):
        model.save_pretrained("")
    with pytest.raises(ArgumentError, match="did you mean 'max_shard_size'"):
        model.save_pretrained(folder, max_shards_size="1GB")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied.*check the permissions"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    (folder / "sub/config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        model.save_pretrained(folder / "sub")


def test_adapter_layers_are_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert_equal_state(Model.from_pretrained(tmp_path), merged)
    changed = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[changed], tiny_model().state_dict()[changed])


def test_models_that_do_not_fit_their_config_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm_head = torch.nn.Linear(48, 600, bias=False)
    with pytest.raises(CheckpointError, match=r"lm_head.weight \[600, 48\] in place of \[512, 48\]"):
        model.save_pretrained(tmp_path)
    model = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(CheckpointError, match=r"offloaded.*lm_head\.weight"):
        model.save_pretrained(tmp_path)
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(512, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match="not floating point"):
        model.save_pretrained(tmp_path)


# Saves that fail half way


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_a_save_that_fails_leaves_the_old_folder(
    folder: Path, failure: BaseException, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fail_at(monkeypatch, os, "fsync", step, failure)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        tiny_model(seed=1).save_pretrained(folder, max_shard_size="100KB")
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def fail_at(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    step: int,
    failure: BaseException,
    after: bool = False,
) -> None:
    """Lets the call number `step` of a function fail, before or after it has done its work."""
    original, calls = getattr(module, name), iter(range(1_000_000))

    def function(*arguments: Any, **options: Any) -> Any:
        is_due = next(calls) == step
        if is_due and not after:
            raise failure
        result = original(*arguments, **options)
        if is_due:
            raise failure
        return result

    monkeypatch.setattr(module, name, function)


def test_a_full_disk(folder: Path) -> None:
    """A real failing write: for a while the process may not write files of more than 100 kB."""
    resource = pytest.importorskip("resource")
    before = sorted(os.listdir(folder))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save to .*File too large"):
            tiny_model(seed=1).save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(folder)) == before
    assert_equal_state(Model.from_pretrained(folder), tiny_model())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_ctrl_c_during_the_renames_waits_for_their_end(
    folder: Path, step: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, os, "replace", step, KeyboardInterrupt(), after)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(seed=1).save_pretrained(folder, max_shard_size="100KB")
    monkeypatch.undo()
    (folder / SINGLE).unlink(missing_ok=True)  # the clean-up is what the interrupt cut short
    assert_equal_state(Model.from_pretrained(folder), tiny_model(seed=1))
    assert list(folder.glob(".saving-*")) == []


class Killed(BaseException):
    """Stands for a process that ends here and now: nothing cleans up after it."""


@pytest.mark.parametrize("sizes", [("5GB", "5GB"), ("200KB", "200KB"), ("5GB", "200KB"), ("200KB", "5GB")])
def test_a_killed_save_is_loaded_whole_or_refused(
    tmp_path: Path, sizes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills the save at each of its steps: the folder then is the old one, the new one, or an error."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and without effect on what is tested
    old, new = tiny_model(seed=0), tiny_model(seed=1, rms_norm_eps=1e-5)
    outcomes = set()
    for function in ("fsync", "replace", "unlink"):
        for step in range(100):
            folder = tmp_path / f"{function}-{step}"
            old.save_pretrained(folder, max_shard_size=sizes[0])
            with monkeypatch.context() as patch:
                patch.setattr(whole_files.AtomicFolder, "_remove_temporaries", lambda self: None)
                fail_at(patch, Path if function == "unlink" else os, function, step, Killed())
                try:
                    new.save_pretrained(folder, max_shard_size=sizes[1])
                    is_finished = True
                except Killed:
                    is_finished = False
            outcomes.add(outcome(folder, old, new))
            new.save_pretrained(folder, max_shard_size=sizes[1])
            assert outcome(folder, old, new) == "new"
            assert list(folder.glob(".saving-*")) == []
            if is_finished:
                break
    assert outcomes == {"old", "new", "refused"}


def outcome(folder: Path, old: Any, new: Any) -> str:
    try:
        loaded = Model.from_pretrained(folder)
    except AudioFlamingoError:
        return "refused"
    is_new = loaded.config.text_config.rms_norm_eps == new.config.text_config.rms_norm_eps
    assert_equal_state(loaded, new if is_new else old)
    return "new" if is_new else "old"


def test_an_interrupted_rename_is_told_from_an_interrupted_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files.AtomicFolder, "_remove_temporaries", lambda self: None)
    with monkeypatch.context() as patch:
        fail_at(patch, os, "fsync", 1, Killed())
        with pytest.raises(Killed):
            tiny_model(seed=1).save_pretrained(folder)
    assert list(folder.glob(".saving-*")) != []
    assert_equal_state(Model.from_pretrained(folder), tiny_model())
    with monkeypatch.context() as patch:
        fail_at(patch, os, "replace", 2, Killed())
        with pytest.raises(Killed):
            tiny_model(seed=1).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="interrupted while its files were put in place"):
        Model.from_pretrained(folder)


def test_a_rename_that_the_system_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, message in ((0, "is as it was before"), (1, "holds half of the new files")):
        with monkeypatch.context() as patch:
            fail_at(patch, os, "replace", step, PermissionError(errno.EACCES, "in use"))
            with pytest.raises(CheckpointError, match=message):
                tiny_model(seed=1).save_pretrained(folder)
        if step == 0:
            assert_equal_state(Model.from_pretrained(folder), tiny_model())
    with pytest.raises(CheckpointError, match="interrupted"):
        Model.from_pretrained(folder)
