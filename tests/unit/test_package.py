"""The package as a whole: its public names, what importing it loads, what it must never import."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import audioflamingo
from audioflamingo.lazy import uncollected

PACKAGE = Path(audioflamingo.__file__).parent


@pytest.mark.parametrize("name", audioflamingo.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    assert getattr(audioflamingo, name).__doc__
    assert name in dir(audioflamingo)


def test_every_lazy_name_is_public_and_the_other_way_round() -> None:
    assert sorted([*audioflamingo._MODULE_OF, "errors"]) == sorted(audioflamingo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'"):
        audioflamingo.AutoModel  # noqa: B018


@pytest.mark.parametrize("is_on", [True, False])
def test_a_block_without_garbage_collection_leaves_it_as_it_was(is_on: bool) -> None:
    was_on = gc.isenabled()
    (gc.enable if is_on else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == is_on
        with pytest.raises(ZeroDivisionError), uncollected():
            _ = 1 / 0
        assert gc.isenabled() == is_on
    finally:
        (gc.enable if was_on else gc.disable)()


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_at_the_end_of_a_process_nothing_is_looked_through_any_more() -> None:
    program = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000)); import audioflamingo"
    assert run(program + "; print(gc.get_freeze_count() > 1000)").split() == ["False", "True"]


def test_importing_the_package_alone_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'av', 'tokenizers', 'jinja2', 'huggingface_hub'}"
    assert run(f"import audioflamingo, sys; print({heavy} & set(sys.modules))").strip() == "set()"


def test_the_model_loads_no_optional_or_slow_package() -> None:
    """Import time: each of these takes longer than all of this package."""
    slow = "{'transformers', 'librosa', 'accelerate', 'peft', 'scipy', 'av', 'huggingface_hub', 'matplotlib', 'pandas'}"
    program = f"""
import torch, sys
before = set(sys.modules)
from audioflamingo import AudioFlamingo3ForConditionalGeneration, AutoProcessor
print({slow} & (set(sys.modules) - before))
"""
    assert run(program).strip() == "set()"


def test_the_package_never_imports_the_reference() -> None:
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [
            line for line in lines if line.strip().startswith(("import transformers", "from transformers"))
        ], path
