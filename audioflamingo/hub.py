"""From a model id or a path to a local folder.

The only module that talks to the Hugging Face hub. A folder that exists is used as it is; anything that
cannot be a hub id and does not exist is an error; the rest is fetched into the hub's cache by
`huggingface_hub`, which resumes broken downloads and honours `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` and
`HF_TOKEN`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from audioflamingo.errors import ArgumentError, CheckpointError, DataError

PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt")
MODEL_FILES = (
    *PROCESSOR_FILES,
    "model*.safetensors",
    *(f"{part}/*.safetensors" for part in ("llm", "sound_tower", "sound_mm_projector")),
)
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model.*", "non_lora_trainables.bin")
THINK_FOLDERS = ("think", "stage35")  # the adapter for thinking: transformers' layout, NVIDIA's
# Training states that share a repository with the model.
IGNORED_FILES = ("checkpoint-*/*", "*/checkpoint-*/*", "*/global_step*/*")

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".safetensors", ".bin", ".json", ".pt", ".pth", ".ckpt", ".gguf", ".zip", ".tar", ".gz")

BUILT_IN_MODEL = "nano"  # its name is taken, so that it never asks the hub for somebody else's
BUILT_IN_FOLDER = Path(__file__).parent / BUILT_IN_MODEL


def resolve_folder(
    id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_patterns: Iterable[str] = MODEL_FILES,
    endpoint: str | None = None,
) -> Path:
    """Finds the local folder of a checkpoint, downloading what is needed of it.

    Args:
        id_or_path: a folder, a hub id such as `"nvidia/audio-flamingo-3-hf"`, or `"nano"`, the model that comes with
            the package. A folder that exists wins.
        revision: branch, tag or commit of the hub repository; not for local folders.
        token: hub token; None takes `HF_TOKEN` or the stored login, False sends none. Unused for local
            folders.
        cache_dir: where downloads are kept; None is the hub's own cache. Unused for local folders.
        local_files_only: use the cache and never the network.
        allow_patterns: the files to fetch: `MODEL_FILES`, or `PROCESSOR_FILES` for everything but the
            weights.
        endpoint: address of the hub; None takes `HF_ENDPOINT`.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is no such folder, or it cannot be downloaded. The message says what to do.
        ArgumentError: an argument of the wrong type, or `revision` together with a local folder.
    """
    if not isinstance(id_or_path, str | os.PathLike) or isinstance(os.fspath(id_or_path), bytes):
        raise ArgumentError(f"id_or_path must be a hub id or a folder, got {type(id_or_path).__name__}.")
    name = os.fspath(id_or_path)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if revision is not None:
            raise ArgumentError(f"revision={revision!r} needs a hub id, but {name!r} is a local folder.")
        return folder
    if name and folder.exists():
        raise CheckpointError(f"{name!r} is a file; pass the folder that holds it.")
    if name == BUILT_IN_MODEL:
        return _built_in_folder(revision)
    if isinstance(id_or_path, os.PathLike) or not _may_be_repository(name):
        raise CheckpointError(f"there is no folder {name!r} (looked for {folder.absolute()}).")
    return _download(name, revision, token, cache_dir, local_files_only, list(allow_patterns), endpoint)


def _built_in_folder(revision: str | None) -> Path:
    """The folder of the model that comes with the package."""
    if revision is not None:
        raise ArgumentError(
            f"revision={revision!r} needs a hub id: {BUILT_IN_MODEL!r} comes with the package."
        )
    if not (BUILT_IN_FOLDER / "config.json").exists():
        raise CheckpointError(
            f"this installation lacks the built-in model (looked for {BUILT_IN_FOLDER}): install the package again, or "
            "name a hub id such as 'nvidia/audio-flamingo-3-hf', or a folder."
        )
    return BUILT_IN_FOLDER


def _may_be_repository(name: str) -> bool:
    """Whether `name` has the form of a hub id and not of a file."""
    return bool(_REPOSITORY_ID.fullmatch(name)) and not name.lower().endswith(_FILE_SUFFIXES)


def _download(
    repository: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    patterns: list[str],
    endpoint: str | None,
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=patterns,
            ignore_patterns=list(IGNORED_FILES),
            library_name="audioflamingo",
            endpoint=endpoint,
        )
    except Exception as error:  # the client raises its own, the system's and those of its HTTP library
        raise _explain(error, repository, revision) from error
    return Path(folder)


def _explain(error: Exception, repository: str, revision: str | None) -> CheckpointError:
    """Turns an error of the hub client into ours: what happened and what to do."""
    from huggingface_hub import errors as hub_errors

    where = f"{repository!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, hub_errors.GatedRepoError):
        advice = (
            "access to it must be granted first: accept its terms on its hub page, then log in"
            " (`hf auth login`) or pass token="
        )
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        advice = "the repository has no such branch, tag or commit: check revision="
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        advice = (
            "there is neither a local folder of that name nor such a repository on the hub: check the "
            "spelling, and for a private repository log in (`hf auth login`) or pass token="
        )
    elif type(error).__name__ == "IncompleteSnapshotError":  # in newer versions of the hub client only
        advice = "the cache holds only part of it: load it once with network access"
    elif isinstance(error, hub_errors.LocalEntryNotFoundError):
        advice = (
            "it is not in the cache and the hub was not reached: check the network, unset HF_HUB_OFFLINE, "
            "drop local_files_only=True, or pass a local folder"
        )
    elif isinstance(error, hub_errors.HFValidationError):
        advice = "that is neither a local folder nor a valid hub id ('owner/name')"
    elif isinstance(error, hub_errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        advice = "the hub refused the token: log in again (`hf auth login`) or pass another token="
    else:
        advice = "check the network and the space on the disk, then run it again: a broken download resumes"
    return CheckpointError(f"cannot get {where}: {advice}. ({type(error).__name__}: {error})")


def resolve_dataset(id_or_path: str, revision: str | None = None) -> Path:
    """Finds the local folder of a data set on the hub, downloading it where it is not in the cache.

    Raises:
        DataError: it is neither there nor to be had.
    """
    if not _may_be_repository(id_or_path) or "/" not in id_or_path:
        raise DataError(
            f"there is no file or folder {id_or_path!r} (looked for {Path(id_or_path).absolute()})."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(id_or_path, repo_type="dataset", revision=revision))
    except Exception as error:  # as in `_download`
        raise DataError(
            str(_explain(error, id_or_path, revision)).replace("local folder", "local file")
        ) from error
