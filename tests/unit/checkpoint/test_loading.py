"""Loading: layouts, strictness, dtypes, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from audioflamingo.checkpoint.fill_weights import build_empty
from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.errors import (
    ArgumentError,
    AudioFlamingoError,
    AudioFlamingoWarning,
    CheckpointError,
    ConfigError,
    DeviceError,
)
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from audioflamingo.quantization.quantize_model import quantize
from tests.support.checkpoint_folders import (
    INDEX,
    SINGLE,
    assert_equal_state,
    edit_json,
    edit_tensors,
    make_nvidia_folder,
)
from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch, tiny_config_dict, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, saved once; tests that change the folder copy it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_model_loads_again_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert_equal_state(loaded, model)
    assert loaded.dtype == dtype
    assert loaded.config.dtype == str(dtype).removeprefix("torch.")
    assert not loaded.training
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == trained


def test_loaded_model_computes_what_the_saved_one_did(saved: Path) -> None:
    batch = make_batch([([300], 4), ([120], 7)])
    with torch.no_grad():
        assert torch.equal(Model.from_pretrained(saved)(**batch).logits, tiny_model()(**batch).logits)


# Memory


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_weights_are_the_mapped_file_and_training_leaves_it_alone(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    model = Model.from_pretrained(folder)
    ranges = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if SINGLE in line
    ]
    for parameter in model.parameters():
        assert any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in ranges)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / SINGLE).read_bytes() == content


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory counters")
def test_loading_takes_no_memory_beyond_the_result(tmp_path: Path) -> None:
    """Anonymous memory: almost none for mapped weights, the result and one tensor for converted ones."""
    config = tiny_config_dict(vocab_size=40_000, hidden_size=512, num_attention_heads=8)
    model = build_empty(Model, AudioFlamingo3Config.from_dict(config)).to(torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path, max_shard_size="30MB")
    file_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert file_bytes > 80e6
    script = (
        "import json, sys\n"
        "from benchmarks.load import measure\n"
        "dtypes = ('bfloat16', 'float32')\n"
        "print(json.dumps([measure('audioflamingo', sys.argv[1], dtype) for dtype in dtypes]))\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", script, str(tmp_path)]
    output = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout
    mapped, converted = json.loads(output.splitlines()[-1])
    room = 10e6
    assert mapped["peak_anonymous_bytes"] < room
    largest_tensor = 40_000 * 512 * 4
    assert converted["kept_anonymous_bytes"] < 2 * file_bytes + room
    assert converted["peak_anonymous_bytes"] < 2 * file_bytes + largest_tensor + room


# Layouts


def test_in_memory_names_load(folder: Path) -> None:
    save_file(tiny_model().state_dict(), folder / SINGLE)
    assert_equal_state(Model.from_pretrained(folder), tiny_model())


def test_nvidia_folders_load(tmp_path: Path) -> None:
    make_nvidia_folder(tmp_path / "af3", tiny_model())
    model = Model.from_pretrained(tmp_path / "af3")
    assert_equal_state(model, tiny_model())
    assert model.config.audio_token_id == AUDIO_TOKEN_ID
    assert model.generation_config.eos_token_id == 7
    model.save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("audioflamingo3", "float32")
    assert config["audio_config"]["model_type"] == "audioflamingo3_encoder"
    assert "_name_or_path" not in config["text_config"]
    assert_equal_state(Model.from_pretrained(tmp_path / "hub"), tiny_model())


def test_nvidia_folders_with_shards_generation_config_and_tokenizer_config(tmp_path: Path) -> None:
    make_nvidia_folder(tmp_path, tiny_model())
    llm = tmp_path / "llm"
    tensors = load_file(llm / SINGLE)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, llm / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (llm / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (llm / SINGLE).unlink()
    (tmp_path / "sound_mm_projector" / SINGLE).rename(tmp_path / "sound_mm_projector/projector.safetensors")
    (llm / "added_tokens.json").unlink()
    (llm / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"499": {"content": "<sound>"}}})
    )
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "top_k": 20}))
    model = Model.from_pretrained(tmp_path)
    assert_equal_state(model, tiny_model())
    assert model.config.audio_token_id == 499
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([1, 2], 20)


def test_nvidia_folders_of_another_model_or_incomplete_are_refused(tmp_path: Path) -> None:
    make_nvidia_folder(tmp_path, tiny_model())
    (tmp_path / "vision_tower").mkdir()
    with pytest.raises(CheckpointError, match=r"vision_tower.*another model"):
        Model.from_pretrained(tmp_path)
    (tmp_path / "vision_tower").rmdir()
    shutil.rmtree(tmp_path / "sound_tower")
    with pytest.raises(CheckpointError, match="no folder sound_tower"):
        Model.from_pretrained(tmp_path)


def test_special_ids_come_from_the_text_config_without_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text_config, "eos_token_id": 9, "bos_token_id": None})
    assert Model.from_pretrained(folder).generation_config.eos_token_id == 9


# What is wrong with a folder


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__delitem__(name))


def _put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def _cut(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-1000])


def _damage_header(folder: Path) -> None:
    content = bytearray((folder / SINGLE).read_bytes())
    content[20:30] = b"\xff" * 10
    (folder / SINGLE).write_bytes(content)


def _damage_offsets(folder: Path) -> None:
    """A header that is JSON and ends where the file does, but whose tensors overlap."""
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = min((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0])
    first["data_offsets"] = [4, first["data_offsets"][1]]
    encoded = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def _replace_weights(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return change


K_BIAS = "audio_tower.layers.0.self_attn.k_proj.bias"
LM_HEAD = "language_model.lm_head.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(LM_HEAD), r"1 missing: lm_head.weight \[512, 48\]"),
        (_put(K_BIAS, torch.zeros(32)), rf"1 unexpected: {K_BIAS} \[32\]"),
        (_put(LM_HEAD, torch.zeros(511, 48)), rf"{LM_HEAD} is \[511, 48\], needs \[512, 48\]"),
        (_put("lm_head.weight", torch.zeros(512, 48)), "the same tensor twice: .*lm_head.weight"),
        (
            _put("vision_tower.weight", torch.zeros(1)),
            r"no part of Audio Flamingo 3: vision_tower.weight \[1\]",
        ),
        (
            _put(LM_HEAD, torch.zeros(512, 48, dtype=torch.int8)),
            rf"a dtype that they cannot have.*{LM_HEAD} \(I8\)",
        ),
        (_cut, "cut off or damaged"),
        (_damage_header, "header of .* is damaged"),
        (_damage_offsets, "cannot read .*model.safetensors"),
        (lambda folder: (folder / SINGLE).write_bytes(b"\x01"), "is cut off or is no safetensors file"),
        (lambda folder: (folder / SINGLE).write_bytes(b""), "is cut off or is no safetensors file"),
        (lambda folder: (folder / SINGLE).write_text("<html>" * 9), "is cut off or is no safetensors file"),
        (lambda folder: (folder / SINGLE).write_text(POINTER), "git lfs pull"),
        (_replace_weights(), "holds no weights"),
        (_replace_weights("pytorch_model.bin"), r"pytorch_model.bin only.*save_file"),
        (_replace_weights("adapter_config.json", "adapter_model.safetensors"), "PeftModel.from_pretrained"),
        (_replace_weights("model-00001-of-00002.safetensors"), "no model.safetensors.index.json"),
        (_replace_weights("a.safetensors", "b.safetensors"), "no model.safetensors.index.json"),
        (lambda folder: (folder / INDEX).write_text("{}"), "holds both"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        Model.from_pretrained(folder)


def _edit_index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, **changes)


def _promise(name: str, file: str | None = None) -> Callable[[Path], None]:
    """Lets the index name a tensor that is not in that shard (the first one by default)."""

    def change(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={**weight_map, name: file or min(weight_map.values())})

    return change


def _remove_shard(folder: Path) -> None:
    sorted(folder.glob("model-00003-*"))[0].unlink()


def _replace_shard(folder: Path) -> None:
    """One shard of another save of the very same model, as a broken copy leaves it."""
    tiny_model(seed=1).save_pretrained(folder.parent / "other", max_shard_size="100KB")
    shutil.copy(next((folder.parent / "other").glob("model-00002-*")), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / INDEX).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), "must hold a JSON object"),
        (_edit_index(weight_map={}), "no 'weight_map'"),
        (_edit_index(weight_map={"a": "../secret.safetensors"}), "not the name of a file beside it"),
        (_edit_index(weight_map={"a": 3}), "not the name of a file beside it"),
        (_promise("new"), r"do not hold: new \(model-00001"),
        (_promise("new", "other.safetensors"), r"other\.safetensors, which is not there"),
        (_remove_shard, "model-00003.*which is not there"),
        (_replace_shard, "mixes files of 2 saves"),
    ],
)
def test_damaged_shards_are_refused(sharded: Path, change: Callable[[Path], None], message: str) -> None:
    change(sharded)
    with pytest.raises(CheckpointError, match=message):
        Model.from_pretrained(sharded)


@pytest.mark.parametrize("model_type", ["musicflamingo", "qwen2_audio", "llava_llama"])
def test_other_models_are_refused_by_name(folder: Path, model_type: str) -> None:
    edit_json(folder / "config.json", model_type=model_type)
    with pytest.raises(ConfigError, match=model_type):
        Model.from_pretrained(folder)


def test_folder_without_configuration(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        Model.from_pretrained(folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter, not a model"):
        Model.from_pretrained(tmp_path / "adapter")


def test_error_lists_some_and_counts_the_rest(folder: Path) -> None:
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text_config, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"12 missing: .* and 7 more\. Check that config\.json"):
        Model.from_pretrained(folder)


# Arguments


def test_what_changes_nothing_is_taken(saved) -> None:
    """Calls written for transformers pass such words; they were refused as unknown."""
    Model.from_pretrained(saved, low_cpu_mem_usage=True, trust_remote_code=True, use_safetensors=True)
    Model.from_pretrained(saved, force_download=False, variant=None, subfolder="", load_in_8bit=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtyp": "float32"}, "did you mean 'dtype'"),
        ({"quantization": "int3"}, "int3.*does not exist; choose from"),
        ({"load_in_8bit": True}, "load_in_8bit=.*not implemented"),
        ({"use_safetensors": False}, r"use_safetensors=False\) is not implemented"),
        ({"max_memory": {0: "1GB"}}, "max_memory=.*not implemented"),
        ({"dtype": "float31"}, "float31"),
        ({"dtype": 16}, "dtype must be"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "contradicts"),
        ({"attn_implementation": "flash"}, "flash"),
        ({"config": {}}, "AudioFlamingo3Config"),
        ({"revision": "main"}, "needs a hub id"),
        ({"device_map": "gpu"}, "'gpu' is not a device"),
        ({"device_map": True}, "got True"),
        ({"device_map": {"model": "cpu", "head": "cpu"}}, "'head', which is no module"),
        (
            {"device_map": {"model.language_model": "cpu"}},
            "says nothing about 'model.audio_tower.conv1.weight'",
        ),
    ],
)
def test_wrong_arguments_are_refused(saved: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Model.from_pretrained(saved, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"dtyp": "float32"}, {"dtype": "float31"}, {"dtype": "int8"}, {"device_map": "cuda:99"}, {"config": {}}],
)
def test_wrong_arguments_are_refused_before_anything_is_downloaded(arguments: dict[str, Any]) -> None:
    with pytest.raises(AudioFlamingoError, match=r"float31|int8|cuda:99|dtyp|AudioFlamingo3Config"):
        Model.from_pretrained("nvidia/audio-flamingo-3-hf", **arguments)


@pytest.mark.parametrize("dtype", ["int8", "torch.float8_e4m3fn", torch.int64, torch.complex64])
def test_dtypes_that_cannot_run_are_refused(saved: Path, dtype: Any) -> None:
    with pytest.raises(DeviceError, match="cannot run in dtype"):
        Model.from_pretrained(saved, dtype=dtype)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_is_converted(saved: Path, name: str, dtype: Any) -> None:
    model = Model.from_pretrained(saved, **{name: dtype})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_equal_state(model, tiny_model().to(torch.bfloat16))


def test_float16_weights_are_kept_where_it_is_asked(tmp_path: Path) -> None:
    """Of the language model's linear layers alone; and they count as if they were widened."""
    tiny_model(hidden_size=64).half().save_pretrained(tmp_path)
    wide = Model.from_pretrained(tmp_path, dtype="float32")
    kept = Model.from_pretrained(tmp_path, dtype="float32", keep_float16=True)
    names = {name for name, tensor in kept.state_dict().items() if tensor.dtype == torch.float16}
    assert len(names) == 2 * 7 + 1
    assert all(name.endswith("_proj.weight") or name == "lm_head.weight" for name in names)
    assert kept.dtype == torch.float32
    inputs = make_batch([([300], 5), ([40], 9)])
    with torch.no_grad():
        torch.testing.assert_close(kept(**inputs).logits, wide(**inputs).logits, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(kept.generate(**inputs, **options), wide.generate(**inputs, **options))
    plain = Model.from_pretrained(
        tmp_path, keep_float16=True
    )  # as stored: nothing is widened, nothing kept apart
    assert {tensor.dtype for tensor in plain.state_dict().values()} == {torch.float16}


EMBEDDINGS = "language_model.model.embed_tokens.weight"


def _store_in_float8(folder: Path) -> dict[str, torch.Tensor]:
    """Stores embeddings and output layer of a folder in float8; returns their values."""
    stored = load_file(folder / SINGLE)
    found = {name: stored[name].to(torch.float8_e4m3fn) for name in (EMBEDDINGS, LM_HEAD)}
    edit_tensors(folder, lambda tensors: tensors.update(found))
    return {name: tensor.float() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "auto"])
def test_float8_is_read_as_what_it_stands_for(tmp_path: Path, dtype: str) -> None:
    """As transformers reads it: widened, exactly."""
    tiny_model().half().save_pretrained(tmp_path)
    values = _store_in_float8(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "float32" else torch.float16)
    assert model.lm_head.weight.dtype == model.dtype
    assert torch.equal(model.lm_head.weight.float(), values[LM_HEAD])
    assert torch.equal(model.get_input_embeddings().weight.float(), values[EMBEDDINGS])


def test_float8_counts_as_float16_where_that_is_kept_and_quantizes(tmp_path: Path) -> None:
    tiny_model(hidden_size=64).half().save_pretrained(tmp_path)
    head = _store_in_float8(tmp_path)[LM_HEAD]
    kept = Model.from_pretrained(tmp_path, dtype="float32", keep_float16=True)
    assert kept.lm_head.weight.dtype == torch.float16
    assert torch.equal(kept.lm_head.weight.float(), head)
    loaded = Model.from_pretrained(tmp_path, quantization="int8")
    assert_equal_state(loaded, quantize(Model.from_pretrained(tmp_path), "int8"))


def test_float8_with_scales_of_another_library_is_refused(tmp_path: Path) -> None:
    tiny_model().half().save_pretrained(tmp_path)
    _store_in_float8(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"{LM_HEAD}_scale": torch.ones(512, 1)}))
    with pytest.raises(CheckpointError, match=r"unexpected: .*weight_scale|no part of .*weight_scale"):
        Model.from_pretrained(tmp_path)


def test_checkpoints_own_dtype(folder: Path) -> None:
    """The configuration decides, with a warning if the weights differ; without it, the weights do."""
    tiny_model().to(torch.float16).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Model.from_pretrained(folder, dtype="auto").dtype == torch.float16
        edit_json(folder / "config.json", dtype=None)
        assert Model.from_pretrained(folder).dtype == torch.float16
    edit_json(folder / "config.json", dtype="bfloat16")
    with pytest.warns(AudioFlamingoWarning, match="stored in float16, but its configuration says bfloat16"):
        assert Model.from_pretrained(folder).dtype == torch.bfloat16
    edit_json(folder / "config.json", dtype="int8")
    with pytest.raises(ConfigError, match=r"config\.json.*int8"):
        Model.from_pretrained(folder)


def test_attention_implementation_and_config_are_used(saved: Path) -> None:
    config = AudioFlamingo3Config.from_dict({**tiny_config_dict(), "mark": 1})
    model = Model.from_pretrained(saved, attn_implementation="eager", config=config, dtype="float16")
    assert model.config.extra["mark"] == 1
    assert config.dtype is None
    output = model(input_ids=torch.tensor([[1, 2]]), output_attentions=True)
    assert output.attentions is not None
