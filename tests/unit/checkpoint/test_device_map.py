"""Devices: what `device_map=` may say, which devices there are, and models over several of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audioflamingo.checkpoint import device_map
from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.errors import ArgumentError, DeviceError, MissingDependencyError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from tests.support.checkpoint_folders import assert_equal_state
from tests.support.tiny_model import make_batch, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved once."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "placement",
    [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}],
)
def test_cpu_placements(saved: Path, placement: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    model = Model.from_pretrained(saved, device_map=placement)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_equal_state(model, tiny_model())


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda", 3), "mps", {"": "cuda"}])
def test_absent_devices_are_named(saved: Path, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"is not here.*'cpu'"):
        Model.from_pretrained(saved, device_map=device)


@pytest.mark.parametrize("device", ["meta", "disk", "vulkan"])
def test_devices_that_cannot_run_the_model_are_refused(saved: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=device):
        Model.from_pretrained(saved, device_map=device)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has two GPUs of compute capability 7.5; nothing can be put on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.usefixtures("two_gpus")
def test_devices_and_dtypes_of_a_machine_with_gpus(saved: Path) -> None:
    assert device_map.parse_device("cuda") == torch.device("cuda", 1)
    assert device_map.parse_device(0) == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=r"sees 2 CUDA device\(s\).*'cuda:0', 'cuda:1', 'cpu'"):
        device_map.parse_device("cuda:2")
    with pytest.raises(DeviceError, match=r"Tesla T4.*7\.5.*float16"):
        Model.from_pretrained(saved, device_map="cuda:0", dtype="bfloat16")


@pytest.mark.usefixtures("two_gpus")
def test_dicts_become_few_disjoint_parts(saved: Path) -> None:
    model = build_empty(Model, AudioFlamingo3Config.from_pretrained(saved))
    layers = "model.language_model.layers"
    wish = {"": 0, layers: "cuda:1", f"{layers}.0": 0, "lm_head": torch.device("cuda", 1)}
    placement = device_map.plan_placement(wish, model, torch.float16)
    assert placement.is_split
    assert {name: device.index for name, device in placement.devices.items()} == {
        "model.audio_tower": 0,
        "model.multi_modal_projector": 0,
        "model.language_model.embed_tokens": 0,
        f"{layers}.0": 0,
        f"{layers}.1": 1,
        "model.language_model.norm": 0,
        "lm_head": 1,
    }
    assert placement.device_of(f"{layers}.1.mlp.up_proj.weight") == torch.device("cuda", 1)
    for block in ("model.audio_tower.layers", f"{layers}.0.mlp"):
        with pytest.raises(ArgumentError, match="must lie on one device"):
            device_map.plan_placement({"": 0, block: 1}, model, torch.float16)


def test_auto_keeps_layers_whole_and_fits_the_devices(saved: Path) -> None:
    model = build_empty(Model, AudioFlamingo3Config.from_pretrained(saved))
    num_bytes = {name: parameter.numel() * 4 for name, parameter in model.named_parameters()}
    room = {0: sum(num_bytes.values()) * 6 // 10, 1: sum(num_bytes.values()) * 6 // 10}
    placement = device_map.Placement(device_map.split_over_devices(model, torch.float32, dict(room)))
    used: dict[int, int] = {0: 0, 1: 0}
    for name, size in num_bytes.items():
        device = placement.device_of(name)
        assert device is not None
        used[device.index] += size
    assert all(0 < used[index] <= room[index] for index in room)
    blocks = ["model.audio_tower", *(f"model.language_model.layers.{n}" for n in range(2))]
    for block in blocks:
        assert len({placement.device_of(name) for name in num_bytes if name.startswith(block + ".")}) == 1
    with pytest.raises(DeviceError, match="more than the devices have free"):
        device_map.split_over_devices(model, torch.float32, {0: 1000, 1: 1000})


@pytest.mark.usefixtures("two_gpus")
def test_several_devices_need_accelerate(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'audioflamingo\[multi-gpu\]'"):
        Model.from_pretrained(saved, dtype="float16", device_map={"model": 0, "lm_head": 1})


def test_moves_between_devices_change_nothing(saved: Path) -> None:
    """accelerate's hooks around the blocks that a split model has, all on the CPU."""
    import accelerate

    model = Model.from_pretrained(saved)
    names = ["model.audio_tower", "model.multi_modal_projector", "model.language_model.embed_tokens"]
    names += [f"model.language_model.layers.{n}" for n in range(2)] + ["model.language_model.norm", "lm_head"]
    accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)
    assert hasattr(model.model.language_model.layers[0], "_hf_hook")
    batch = make_batch([([300], 4), ([120], 7)])
    with torch.no_grad():
        expected = tiny_model()
        assert torch.equal(model(**batch).logits, expected(**batch).logits)
        arguments = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**batch, **arguments), expected.generate(**batch, **arguments))


def test_parts_in_cpu_memory_change_nothing(saved: Path) -> None:
    """accelerate's offloading of single blocks, as beside a GPU, with the CPU in the GPU's place."""
    import accelerate

    model = Model.from_pretrained(saved)
    for part in (model.model.audio_tower, model.model.language_model.layers[1], model.lm_head):
        accelerate.cpu_offload(
            part,
            torch.device("cpu"),
            state_dict=part.state_dict(),
            preload_module_classes=device_map.PRELOADED_MODULES,
        )
    assert model.lm_head.weight.is_meta
    batch = make_batch([([300], 4), ([120], 7)])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, tiny_model()(**batch).logits)


def test_too_little_memory_is_explained(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("audioflamingo.checkpoint.fill_weights._assign", fail)
    with pytest.raises(DeviceError, match=r"the weights take 0\.0 GB in float32"):
        Model.from_pretrained(saved)
