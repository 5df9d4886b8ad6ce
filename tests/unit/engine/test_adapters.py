"""Adapters beside the model: as peft's on transformers' model, never in the base's way, mixed in one batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import audioflamingo
from audioflamingo.engine import audio_encoder
from audioflamingo.engine.engine import Engine
from audioflamingo.engine.generate_call import prepare_one
from audioflamingo.engine.limits import EngineOptions
from audioflamingo.errors import ArgumentError, CheckpointError
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration as Model
from audioflamingo.network import qwen2
from audioflamingo.processor.prompt import Prompt
from tests.support.adapter_folders import edit_adapter, edit_adapter_config, save_adapter
from tests.support.tiny_family import make_music_batch, tiny_music_model, tiny_music_reference
from tests.support.tiny_model import make_batch, tiny_model, tiny_reference

peft = pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers")

GREEDY = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 511}
VARIED = {**GREEDY, "no_repeat_ngram_size": 1}  # a tiny model would repeat one token


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters: of the language model, with other settings, and NVIDIA's form with replaced tensors."""
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(root / "plain", tiny_reference())
    save_adapter(
        root / "scaled",
        tiny_reference(),
        1,
        r=6,
        lora_alpha=30,
        use_rslora=True,
        target_modules=["q_proj", "fc1"],
    )
    save_adapter(root / "think", tiny_reference(), 2)
    other = tiny_reference(seed=5).state_dict()
    extras = ("model.language_model.embed_tokens.weight", "model.multi_modal_projector.linear_1.weight")
    torch.save({f"model.{name}": other[name] for name in extras}, root / "think" / "non_lora_trainables.bin")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def model(folders) -> Model:
    model = tiny_model()
    for name, folder in folders.items():
        model.load_adapter(folder, name)
    return model


def peft_model(folder: Path):
    reference = tiny_reference()
    extra = folder / "non_lora_trainables.bin"
    if extra.exists():
        tensors = {name.removeprefix("model."): t for name, t in torch.load(extra, weights_only=True).items()}
        assert not reference.load_state_dict(tensors, strict=False).unexpected_keys
    return peft.PeftModel.from_pretrained(reference, folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "scaled", "think"])
def test_logits_and_answers_are_pefts(model, folders, name) -> None:
    theirs = peft_model(folders[name])
    batch = make_batch([([3000, 300], 6), ([50], 9), ([], 5)])
    if name != "scaled":
        batch = make_batch([([3000, 300], 6), ([50], 9)])
    mask = batch["attention_mask"].bool()
    with model.use_adapter(name):
        got = model(**batch).logits[mask]
    expected = theirs(**batch).logits[mask]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    assert (got - model(**batch).logits[mask]).abs().max() > 0.05
    ids = model.generate(**batch, **GREEDY, adapter=name)
    assert torch.equal(ids, theirs.generate(**batch, **GREEDY, do_sample=False))


@torch.no_grad()
def test_the_base_is_untouched(model) -> None:
    """P8: to the bit, while adapters are loaded, after they were used, and once they are gone."""
    fresh, batch = tiny_model(), make_batch([([300], 6), ([50], 9)])
    logits, ids = fresh(**batch).logits, fresh.generate(**batch, **GREEDY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in list(model.adapters):
        model.generate(**batch, **GREEDY, adapter=name)
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(model.generate(**batch, **GREEDY), ids)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name in list(model.adapters):
        model.delete_adapter(name)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(**batch).logits, logits)


def test_each_row_of_a_batch_has_its_own(model) -> None:
    rows = [([300], 6), ([50], 9), ([3000, 200], 4), ([], 7)]
    names = ["think", None, "plain", "scaled"]
    batch = make_batch(rows)
    together = model.generate(**batch, **VARIED, adapter=names)[:, batch["input_ids"].shape[1] :]
    for name in (None, *set(filter(None, names))):
        alone = model.generate(**batch, **VARIED, adapter=name)[:, batch["input_ids"].shape[1] :]
        for row, own in enumerate(names):
            if own == name:
                assert torch.equal(alone[row], together[row]), (row, name)
    assert len({tuple(row.tolist()) for row in together}) == len(rows)


def test_long_prompts_in_parts(model, monkeypatch) -> None:
    """The feed-forward part takes a long prompt some tokens at a time, and audio some windows: each row still finds
    its own adapter."""
    batch = make_batch([([300], 6), ([50], 9), ([3000, 200], 4), ([], 7)])
    names = ["think", None, "plain", "scaled"]
    expected = model.generate(**batch, **VARIED, adapter=names)
    monkeypatch.setattr(qwen2, "MLP_TOKENS", 7)
    monkeypatch.setattr(audio_encoder, "MAX_WINDOWS", 1)
    assert torch.equal(model.generate(**batch, **VARIED, adapter=names), expected)
    music, batch = tiny_music_model(), make_music_batch([([[3000, 300], [700]], 6), ([[50]], 5)])
    together = music.generate(**batch, **VARIED)
    monkeypatch.undo()
    assert torch.equal(music.generate(**batch, **VARIED), together)


def test_beams_and_several_answers(model) -> None:
    batch = make_batch([([300], 6), ([50], 9)])
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, **options, adapter=["plain", None])
    for row, name in enumerate(["plain", None]):
        alone = model.generate(**batch, **options, adapter=name)
        assert torch.equal(alone[2 * row : 2 * row + 2], together[2 * row : 2 * row + 2])


def prompts_of(batch) -> list[Prompt]:
    from audioflamingo.processor.collate import unbatch

    return unbatch(audio_token_id=500, **batch)


@pytest.mark.parametrize("piece_s", [None, 0.0005])
def test_a_running_batch_mixes_them_and_caches_keep_them_apart(model, piece_s) -> None:
    """The same prompt and clip for each adapter, twice: from the caches the second time, and never each other's."""
    (prompt,) = prompts_of(make_batch([([3000, 700], 40)]))
    names = [None, "plain", "think", "scaled"]
    expected = {}
    for name in names:
        fresh = Engine(model, None, EngineOptions.alone(1))
        group = fresh.submit(prepare_one(model, prompt, {**VARIED, "adapter": name}))
        while fresh.has_work:
            fresh.step()
        expected[name] = group.sequences[0].new_ids
    assert len({tuple(ids) for ids in expected.values()}) == 4
    options = EngineOptions(cache_tokens=16384, piece_s=piece_s)
    engine = Engine(model, None, options)
    for turn in range(2):
        groups = {
            name: engine.submit(prepare_one(model, prompt, {**VARIED, "adapter": name})) for name in names
        }
        while engine.has_work:
            engine.step()
        for name, group in groups.items():
            assert group.sequences[0].new_ids == expected[name], (turn, name)
            assert (group.num_reused > 0) == (turn == 1)
    # the base and "plain" encode audio alike, "think" and "scaled" do not
    assert engine.clip_cache.num_misses == 3 * 2


def test_a_later_adapter_of_the_same_name_is_another(model, folders) -> None:
    (prompt,) = prompts_of(make_batch([([300], 40)]))
    engine = Engine(model, None, EngineOptions(cache_tokens=4096))

    def answer() -> list[int]:
        group = engine.submit(prepare_one(model, prompt, {**GREEDY, "adapter": "plain"}))
        while engine.has_work:
            engine.step()
        return group.sequences[0].new_ids

    first = answer()
    model.delete_adapter("plain")
    model.load_adapter(folders["think"], "plain")
    assert answer() != first


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "scaled", "think"])
def test_merged_and_saved(model, folders, tmp_path, name) -> None:
    batch = make_batch([([300], 6)])
    with model.use_adapter(name):
        expected = model(**batch).logits
    model.merge_adapter(name)
    assert name not in model.adapters
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-3, rtol=1e-4)
    for other in list(model.adapters):
        model.delete_adapter(other)
    model.save_pretrained(tmp_path)
    assert torch.equal(Model.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_on_quantized_bases(folders, scheme) -> None:
    """The base is rounded, the adapter is not: what it adds stays what it is."""
    base = audioflamingo.quantize(tiny_model(hidden_size=64, num_attention_heads=4), scheme)
    reference = tiny_reference(hidden_size=64, num_attention_heads=4)
    folder = folders["plain"].parent / f"wide-{scheme}"
    theirs = save_adapter(folder, reference)
    base.load_adapter(folder, "wide")
    batch = make_batch([([300], 6)])
    plain, expected = base(**batch).logits, theirs(**batch).logits
    with base.use_adapter("wide"):
        got = base(**batch).logits
    assert (got - expected).norm() < 0.5 * (plain - expected).norm()
    with pytest.raises(ArgumentError, match="is quantized: merge"):
        base.merge_adapter("wide")
    assert torch.equal(base(**batch).logits, plain)


@torch.no_grad()
def test_quantized_with_replaced_tensors(folders) -> None:
    base = audioflamingo.quantize(tiny_model(), "int8")
    base.load_adapter(folders["think"], "think")
    batch = make_batch([([300], 6)])
    with base.use_adapter("think"):
        got = base(**batch).logits
    assert (got - peft_model(folders["think"])(**batch).logits).abs().mean() < 0.1 * got.abs().mean()


@torch.no_grad()
def test_dtypes_copies_and_music(folders, model) -> None:
    batch = make_batch([([300], 6)])
    with model.use_adapter("think"):
        exact = model(**batch).logits
    twin = copy.deepcopy(model).to(torch.bfloat16)
    with twin.use_adapter("think"):
        rough = twin(**batch).logits.float()
    assert (rough - exact).abs().max() < 0.15 * exact.abs().max()
    with model.use_adapter("think"):
        assert torch.equal(model(**batch).logits, exact)
    music, folder = tiny_music_model(), folders["plain"].parent / "music"
    theirs = save_adapter(folder, tiny_music_reference())
    music.load_adapter(folder, "music")
    batch = make_music_batch([([[3000, 300]], 6)])
    with music.use_adapter("music"):
        torch.testing.assert_close(music(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=1e-5)


def test_modules_to_save_and_other_layouts(tmp_path: Path) -> None:
    theirs = save_adapter(
        tmp_path / "head", tiny_reference(), modules_to_save=["lm_head"], target_modules=["v_proj"]
    )
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    theirs.save_pretrained(str(tmp_path / "head"))
    model = tiny_model()
    model.load_adapter(tmp_path / "head", "head")
    batch = make_batch([([300], 6)])
    with torch.no_grad(), model.use_adapter("head"):
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=1e-5)

    def hub_names(tensors) -> None:
        for key in list(tensors):
            tensors[key.replace("model.model.language_model.", "model.language_model.model.")] = tensors.pop(
                key
            )

    def nvidia_names(tensors) -> None:  # LoRA around the language model alone
        for key in list(tensors):
            tensors[key.replace("model.language_model.model.", "model.model.")] = tensors.pop(key)

    save_adapter(tmp_path / "names", tiny_reference())
    logits = []
    for index, change in enumerate((lambda tensors: None, hub_names, nvidia_names)):
        edit_adapter(tmp_path / "names", change)
        model.load_adapter(tmp_path / "names", f"names{index}")
        with torch.no_grad(), model.use_adapter(f"names{index}"):
            logits.append(model(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# What is wrong is said in one line


class Evil:
    def __reduce__(self):
        return print, ("code that must not run",)


def spoil(folder: Path, what: str) -> None:
    if what == "unknown keys":
        edit_adapter(
            folder, lambda t: t.update({"base_model.model.nowhere.lora_A.weight": torch.zeros(4, 4)})
        )
    elif what == "rank":
        edit_adapter_config(folder, r=5)
    elif what == "half":
        edit_adapter(folder, lambda t: t.pop(next(iter(t))))
    elif what == "kind":
        edit_adapter_config(folder, peft_type="IA3")
    elif what == "dora":
        edit_adapter_config(folder, use_dora=True)
    elif what == "pissa":
        edit_adapter_config(folder, init_lora_weights="pissa_niter_4")
    elif what == "pickle":
        torch.save({"model.lm_head.weight": Evil()}, folder / "non_lora_trainables.bin")
    elif what == "extra key":
        torch.save({"model.nowhere.weight": torch.zeros(2)}, folder / "non_lora_trainables.bin")
    elif what == "extra shape":
        torch.save({"model.lm_head.weight": torch.zeros(2, 2)}, folder / "non_lora_trainables.bin")
    elif what == "cut off":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "no config":
        (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unknown keys", r"has 1 of 29 tensors that name nothing in this model: base_model.model.nowhere"),
        ("rank", r"rank 5 and this model need \[5, "),
        ("half", "without the other half"),
        ("kind", "peft_type 'IA3' is not implemented"),
        ("dora", "use_dora = True is not implemented"),
        ("pissa", "changes the base model too"),
        ("pickle", "holds more than tensors"),
        ("extra key", "model.nowhere.weight"),
        ("extra shape", r"lm_head.weight is \[2, 2\], this model needs"),
        ("cut off", "cannot read"),
        ("no config", "holds no adapter: it needs adapter_config.json"),
    ],
)
def test_bad_folders(tmp_path: Path, capsys, what, message) -> None:
    save_adapter(tmp_path, tiny_reference())
    spoil(tmp_path, what)
    model = tiny_model()
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_adapter(tmp_path, "bad")
    assert "\n" not in str(caught.value)
    assert "must not run" not in capsys.readouterr().out
    assert not len(model.adapters)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    save_adapter(tmp_path, tiny_reference(hidden_size=64, num_attention_heads=4))
    with pytest.raises(CheckpointError, match="this model need"):
        tiny_model().load_adapter(tmp_path, "other")


def test_names(model, folders) -> None:
    with pytest.raises(ArgumentError, match="an adapter 'think' already"):
        model.load_adapter(folders["think"], "think")
    batch = make_batch([([300], 6), ([50], 9)])
    with pytest.raises(ArgumentError, match="no adapter 'thnk'; loaded: '"):
        model.generate(**batch, adapter="thnk")
    with pytest.raises(ArgumentError, match="1 entries for 2 prompts"):
        model.generate(**batch, adapter=["think"])
    with pytest.raises(ArgumentError, match="no adapter 'x'"):
        model.use_adapter("x")
    with pytest.raises(CheckpointError, match="there is no folder"):
        model.load_adapter("/nowhere", "x")
    with pytest.raises(ArgumentError, match="adapters are loaded"):
        audioflamingo.quantize(model, "int8")
