"""Every recipe runs on the built-in model with a few rows in the files that it names, and a model comes out."""

from __future__ import annotations

import json
import math
import random
import runpy
from pathlib import Path

import pytest

from tests.support.cli_runs import af3
from tests.support.tiny_training import conversation, write_clip, write_rows

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("peft", reason="needs peft")

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(
    str(path.relative_to(RECIPES))
    for path in RECIPES.rglob("*.yaml")
    if path.relative_to(RECIPES).parts[0] != "nano"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips, and every file that a recipe names, in the form that it is said to have there."""
    folder = tmp_path_factory.mktemp("recipes")
    clips = [write_clip(folder / f"{number}.wav", 0.6, number).name for number in range(6)]
    for split in ("", "_valid"):
        for name, column in (("captions", "caption"), ("classes", "label")):
            lines = [f"{clip},noise {number % 2}" for number, clip in enumerate(clips)]
            text = "\n".join([f"file_name,{column}", *lines])
            (folder / f"{name}{split}.csv").write_text(text + "\n", encoding="utf-8")
    manifest = [{"audio_filepath": clip, "text": "hello", "duration": 0.6} for clip in clips]
    for name in ("train", "valid"):
        write_rows(folder / f"{name}.jsonl", manifest)
    question = "<sound>\nWhich?\n(A) noise\n(B) music"
    for name, thoughts in (
        ("thoughts", "<think>\nIt hisses.\n</think>\n"),
        ("choices", ""),
        ("choices_valid", ""),
    ):
        rows = [
            {
                "id": f"{name}-{clip}", "sound": clip, "duration": 0.6,
                "conversations": [
                    {"from": "human", "value": question}, {"from": "gpt", "value": f"{thoughts}(A) noise"}
                ],
            }
            for clip in clips
        ]  # fmt: skip
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def prepare(name: str, data: Path, tmp_path: Path) -> list[str]:
    """Overrides: the built-in model, two steps of each stage, small batches."""
    import yaml

    values = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    overrides = ["model=nano", f"output_dir={tmp_path / 'run'}", "data.num_workers=0", "tensorboard=false"]
    overrides += ["batch.max_rows=3", "batch.batches_per_step=1", "validation.generate_rows=1", "device=cpu"]
    overrides += ["validation.max_new_tokens=4", "precision=float32", "weights_dtype=float32"]
    for number, stage in enumerate(values["stages"]):
        overrides += [f"stages.{number}.max_steps=2", f"stages.{number}.max_epochs=null"]
        overrides += [f"stages.{number}.max_minutes=null"]
        if "batch" in stage:
            overrides += [f"stages.{number}.batch=null"]
    own = write_rows(data / "own.jsonl", [conversation(str(number), "hello", 0.6) for number in range(6)])
    if name == "stages.yaml":  # made for the data of the built-in model's recipe, whose form these rows have
        overrides += ["augmentation={}", f"feature_cache.folder={tmp_path}", "feature_cache.keep_clean=true"]
    if name in ("stages.yaml", "lora.yaml"):
        overrides += [f"data.train=[{{path: {own}}}]", f"data.validation=[{{path: {own}}}]"]
    return [part for override in overrides for part in ("--set", override)]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "8bit" in (RECIPES / name).read_text(encoding="utf-8"):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    monkeypatch.setenv("DATA", str(data))
    monkeypatch.setenv("NANO_DATA", str(data))
    monkeypatch.setenv("MODEL", "nano")
    result = af3("train", RECIPES / name, *prepare(name, data, tmp_path), "--quiet")
    assert result.exit_code == 0, result.output
    last = tmp_path / "run" / "last"
    assert (last / "README.md").exists()
    assert (last / "model.safetensors").exists() or (last / "adapter" / "adapter_model.safetensors").exists()
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    assert steps[-1]["step"] >= 2
    assert all(math.isfinite(entry["loss"]) for entry in steps)


def test_spelled_rows_are_in_the_form_that_the_model_writes() -> None:
    """In lower case without a point, as they were, the adapter learned that form first, and openings were spoilt."""
    module = runpy.run_path(str(RECIPES / "spelling" / "make_data.py"))
    rng = random.Random(0)
    texts = [module["sentence"](rng, split) for split in ("train", "test") * 20]
    for text in texts:
        opening, *spelled = text.removesuffix(".").split(", ")
        assert text.endswith(".")
        assert opening[0].isupper()
        assert spelled
        assert all((len(item) == 1 and item.isupper()) or item in module["DIGITS"] for item in spelled)
    assert len(set(texts)) == len(texts)


def test_every_recipe_is_in_the_list() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if name not in text] == []
