"""Downloads, through the real hub client, from a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from audioflamingo.errors import ArgumentError, CheckpointError
from audioflamingo.hub import BUILT_IN_FOLDER, PROCESSOR_FILES, resolve_folder
from tests.support.hub_stub import HubStub, StubRepository

FILES = {
    "config.json": b"{}",
    "chat_template.jinja": b"template",
    "merges.txt": b"a b",
    "model-00001-of-00001.safetensors": bytes(range(256)) * 400,
    "model.safetensors.index.json": b'{"index": 1}',
    "llm/config.json": b'{"part": 1}',
    "llm/model.safetensors": b"part",
    "think/adapter_model.safetensors": b"adapter",
    "think/adapter_config.json": b'{"adapter": 1}',
    "llm/checkpoint-5/optimizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "README.md": b"read me",
}
WEIGHTS = {"model-00001-of-00001.safetensors", "llm/model.safetensors"}
SMALL = {
    "config.json",
    "chat_template.jinja",
    "merges.txt",
    "model.safetensors.index.json",
    "llm/config.json",
    "think/adapter_config.json",
}


@pytest.fixture(autouse=True)
def _client_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite runs offline; these tests reach a loopback server, without waiting between retries."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)


@pytest.fixture
def hub() -> Iterator[HubStub]:
    repositories = {
        "nvidia/model": StubRepository({"main": FILES, "v2": {**FILES, "config.json": b'{"v": 2}'}}),
        "nvidia/private": StubRepository({"main": FILES}, token="hf_secret"),
        "nvidia/gated": StubRepository({"main": FILES}, token="hf_secret", is_gated=True),
    }
    with HubStub(repositories) as stub:
        yield stub


def test_downloads_what_the_model_needs_and_nothing_else(hub: HubStub, tmp_path: Path) -> None:
    folder = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == SMALL | WEIGHTS
    assert all((folder / name).read_bytes() == FILES[name] for name in found)


def test_processor_leaves_the_weights_and_the_model_adds_them(hub: HubStub, tmp_path: Path) -> None:
    folder = resolve_folder(
        "nvidia/model", cache_dir=tmp_path, allow_patterns=PROCESSOR_FILES, endpoint=hub.url
    )
    assert set(hub.downloads()) == SMALL
    hub.requests.clear()
    assert resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url) == folder
    assert set(hub.downloads()) == WEIGHTS


def test_second_time_comes_from_the_cache(hub: HubStub, tmp_path: Path) -> None:
    first = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    hub.requests.clear()
    assert resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url) == first
    assert hub.downloads() == []


def test_revisions_are_kept_apart(hub: HubStub, tmp_path: Path) -> None:
    main = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    other = resolve_folder("nvidia/model", revision="v2", cache_dir=tmp_path, endpoint=hub.url)
    assert main != other
    assert json.loads((other / "config.json").read_bytes()) == {"v": 2}
    with pytest.raises(CheckpointError, match="no such branch, tag or commit"):
        resolve_folder("nvidia/model", revision="v3", cache_dir=tmp_path, endpoint=hub.url)


def test_token_is_sent(hub: HubStub, tmp_path: Path) -> None:
    folder = resolve_folder("nvidia/private", token="hf_secret", cache_dir=tmp_path, endpoint=hub.url)
    assert (folder / "config.json").exists()
    assert {headers.get("authorization", headers.get("Authorization")) for _, _, headers in hub.requests} == {
        "Bearer hf_secret"
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nvidia/absent", "neither a local folder"),
        ("nvidia/private", "neither a local folder"),
        ("nvidia/gated", "accept its terms"),
    ],
)
def test_refusals_say_what_to_do(hub: HubStub, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_folder(name, cache_dir=tmp_path, endpoint=hub.url)
    assert name in str(caught.value)


def test_download_that_breaks_off_resumes_at_once(hub: HubStub, tmp_path: Path) -> None:
    big = "model-00001-of-00001.safetensors"
    hub.repositories["nvidia/model"].cuts[big] = 2
    folder = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    assert (folder / big).read_bytes() == FILES[big]
    assert hub.downloads().count(big) == 3


def test_download_that_cannot_finish_is_an_error_and_goes_on_later(hub: HubStub, tmp_path: Path) -> None:
    big = "model-00001-of-00001.safetensors"
    hub.repositories["nvidia/model"].broken.add(big)
    with pytest.raises(CheckpointError, match="a broken download resumes"):
        resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    with pytest.raises(CheckpointError, match="only part of it"):
        resolve_folder("nvidia/model", cache_dir=tmp_path, local_files_only=True, endpoint=hub.url)
    hub.repositories["nvidia/model"].broken.clear()
    folder = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    assert (folder / big).read_bytes() == FILES[big]


def test_local_files_only_never_asks(hub: HubStub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not in the cache"):
        resolve_folder("nvidia/model", cache_dir=tmp_path, local_files_only=True, endpoint=hub.url)
    assert hub.requests == []
    folder = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=hub.url)
    hub.requests.clear()
    again = resolve_folder("nvidia/model", cache_dir=tmp_path, local_files_only=True, endpoint=hub.url)
    assert again == folder
    assert hub.requests == []


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the hub was not reached"):
        resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")


def test_cache_serves_when_the_network_is_gone(tmp_path: Path) -> None:
    with HubStub({"nvidia/model": StubRepository({"main": FILES})}) as stub:
        folder = resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=stub.url)
    assert resolve_folder("nvidia/model", cache_dir=tmp_path, endpoint=stub.url) == folder


def test_environment_variables_are_honoured(hub: HubStub, tmp_path: Path) -> None:
    """`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE` are read when the client is imported."""
    script = (
        "from audioflamingo.hub import resolve_folder\n"
        "from audioflamingo.errors import CheckpointError\n"
        "try:\n    print(resolve_folder('nvidia/private'))\n"
        "except CheckpointError as error:\n    print('refused:', error)\n"
    )

    def run(**changes: str) -> str:
        changes = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **changes}
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **changes},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "HF_HUB_OFFLINE" in run(HF_HUB_OFFLINE="1")
    assert hub.requests == []
    folder = run(HF_TOKEN="hf_secret").strip()
    assert Path(folder).is_relative_to(tmp_path)


def test_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_folder(tmp_path) == tmp_path
    (tmp_path / "nvidia/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("nvidia/model") == Path("nvidia/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/nvidia") == tmp_path / "nvidia"


@pytest.mark.parametrize(
    "name",
    [
        "/no/such",
        "./no",
        "../no",
        "~/no",
        "a/b/c",
        "a\\b",
        "",
        "no/",
        "model.safetensors",
        "a b",
        "nvidia/--",
    ],
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(hub: HubStub, name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve_folder(name, endpoint=hub.url)
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve_folder(Path("nvidia/model"), endpoint=hub.url)
    assert hub.requests == []


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file; pass the folder"):
        resolve_folder(tmp_path / "config.json")
    with pytest.raises(ArgumentError, match="needs a hub id"):
        resolve_folder(tmp_path, revision="main")
    with pytest.raises(ArgumentError, match="got int"):
        resolve_folder(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="got bytes"):
        resolve_folder(b"nvidia/model")  # type: ignore[arg-type]


def test_the_built_in_models_name_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_folder("nano", endpoint="http://127.0.0.1:9") == BUILT_IN_FOLDER
    with pytest.raises(ArgumentError, match="comes with the package"):
        resolve_folder("nano", revision="main")
    monkeypatch.setattr("audioflamingo.hub.BUILT_IN_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match="lacks the built-in model"):
        resolve_folder("nano", endpoint="http://127.0.0.1:9")
