"""The files of a processor and its tokenizer, in today's layout and in older ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from audioflamingo.errors import CheckpointError
from audioflamingo.files import make_folder, read_json, read_text, write_text

# Qwen2 cuts text into: English contractions, words, single digits, punctuation, line ends, other white space.
QWEN2_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def read_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], str | dict[str, str] | None]:
    """Reads the tokenizer of a folder, or of its subfolder `llm` (NVIDIA's original layout).

    Returns:
        The tokenizer, the contents of `tokenizer_config.json`, and the chat template if there is one.

    Raises:
        CheckpointError: files are absent, damaged, or contradict each other.
    """
    folder = folder / "llm" if is_original_layout(folder) else folder
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    special_file = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and special_file.exists():
        config.update(read_json(special_file))
    added_file = folder / "added_tokens.json"
    added = _read_added_tokens(config, read_json(added_file) if added_file.exists() else {})
    if (folder / "tokenizer.json").exists():
        backend = _read_backend(folder / "tokenizer.json")
    elif _has_tokenizer(folder):
        backend = _build_qwen2_backend(folder)
    else:
        raise CheckpointError(f"no tokenizer in {folder}: looked for {', '.join(TOKENIZER_FILES)}.")
    _add_tokens(backend, added, folder)
    return backend, config, read_chat_template(folder, config)


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """Finds the chat template of a folder: its own file first, then the older places.

    Args:
        folder: the checkpoint folder.
        config: the contents of `tokenizer_config.json`.

    Returns:
        The Jinja source; a dict of named ones if there are several; None if there is none.
    """
    templates = {path.stem: read_text(path) for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    json_file, jinja_file = folder / "chat_template.json", folder / "chat_template.jinja"
    found: Any = None
    if json_file.exists():
        found = read_json(json_file).get("chat_template")
    elif jinja_file.exists():
        found = read_text(jinja_file)
    if found is None and not templates:
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    templates.update(found if isinstance(found, dict) else {} if found is None else {"default": found})
    if not all(isinstance(part, str) for item in templates.items() for part in item):
        raise CheckpointError(f"the chat template of {folder} is not text, nor a list of names and texts.")
    return templates["default"] if list(templates) == ["default"] else templates or None


def save_chat_template(folder: Path, chat_template: str | dict[str, str] | None) -> None:
    """Writes `chat_template.jinja`, and further named templates into the subfolder `chat_templates`."""
    templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
    if templates:
        (folder / "chat_template.json").unlink(missing_ok=True)  # an older place, which is read first
    for name, source in templates.items():
        if name == "default":
            write_text(folder / "chat_template.jinja", source)
            continue
        if not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(f"a chat template cannot be called {name!r}: it names a file.")
        make_folder(folder / "chat_templates")
        write_text(folder / "chat_templates" / f"{name}.jinja", source)


def is_original_layout(folder: Path) -> bool:
    """Whether the folder is laid out as NVIDIA's own, with the tokenizer in a subfolder `llm`."""
    return not _has_tokenizer(folder) and _has_tokenizer(folder / "llm")


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (
        (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{path} is not a tokenizer ({error}): is the download complete?") from error


def _build_qwen2_backend(folder: Path) -> tokenizers.Tokenizer:
    """Qwen2's pipeline from its original files: NFC, its split pattern, byte-level BPE."""
    read_json(folder / "vocab.json")
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(
            f"vocab.json and merges.txt in {folder} do not fit together: {error}."
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_added_tokens(config: dict[str, Any], older: dict[str, Any]) -> dict[int, AddedToken]:
    """Control tokens by id: `added_tokens_decoder` of the configuration, or the older `added_tokens.json`."""
    try:
        if "added_tokens_decoder" in config:
            stored = config["added_tokens_decoder"].items()
            return {
                int(token_id): AddedToken(**{k: v for k, v in o.items() if k != "__type"})
                for token_id, o in stored
            }
        return {int(token_id): AddedToken(content, normalized=False) for content, token_id in older.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's list of added tokens is damaged: {error}.") from error


def _add_tokens(backend: tokenizers.Tokenizer, added: dict[int, AddedToken], folder: Path) -> None:
    """Adds the tokens that the backend lacks; each must get the id that the checkpoint gives it."""
    present = {options.content for options in backend.get_added_tokens_decoder().values()}
    for token_id, options in sorted(added.items()):
        if options.content not in present:
            backend.add_tokens([options])
        found = backend.token_to_id(options.content)
        if found != token_id:
            raise CheckpointError(
                f"token {options.content!r} is {token_id} in {folder}, the vocabulary gives it {found}."
            )


def token_content(value: Any) -> str | None:
    """A named token is stored as its text, or as a dict with the text under `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def read_processor_config(folder: Path) -> dict[str, Any]:
    """Contents of `processor_config.json`, if there is one; `processor_class` may be the older file's."""
    config: dict[str, Any] = {}
    classes: dict[str, None] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        if "processor_class" in content:
            classes[content["processor_class"]] = None
        config = config or (content if name == "processor_config.json" else {})
    if len(classes) > 1:
        raise CheckpointError(f"the files of the processor in {folder} belong to {' and to '.join(classes)}.")
    return {**config, "processor_class": next(iter(classes), None)}


def read_feature_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the feature extractor: in the processor's own file, or in one of the older places."""
    if isinstance(config.get("feature_extractor"), dict):
        return config["feature_extractor"]
    for file in (folder / "preprocessor_config.json", folder / "sound_tower" / "preprocessor_config.json"):
        if file.exists():
            return read_json(file)
    if (folder / "sound_tower").is_dir():  # NVIDIA's layout, whose front end is the published one
        return {}
    raise CheckpointError(
        f"no processor_config.json with a feature extractor in {folder}, nor preprocessor_config.json."
    )
