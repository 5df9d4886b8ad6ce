"""Heads of the language model that look at what they write down: how they are chosen, and where they are kept.

A checkpoint may name them in its `generation_config.json` (`alignment_heads`, as Whisper's in transformers, and
`alignment_share`, how much of their attention lay on the path). Found heads that are sure are noted there in memory, so
that a saved model has them, and in a file of the user's cache by the weights they belong to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audioflamingo.config import Qwen2Config
from audioflamingo.errors import AudioFlamingoError
from audioflamingo.files import make_folder, read_json, to_json, write_text
from audioflamingo.network.af3 import AudioFlamingo3WithHead

MAX_HEADS = 8
NEARLY_BEST = 0.8  # of the best head's share: what others need to join it
REACH = 2  # audio tokens around the path that count as on it
UNSURE = 0.4  # share below which times are said to be rough, and heads are not kept
HEADS_KEY, SHARE_KEY = "alignment_heads", "alignment_share"
NUM_VALUES = 32  # of each tensor, by which weights are told apart


@dataclass(frozen=True)
class AlignmentHeads:
    """Heads of the language model that look at what they write down.

    Attributes:
        heads: layer and number of each.
        share: of their attention that lay on the path when they were found.
    """

    heads: tuple[tuple[int, int], ...]
    share: float

    @property
    def is_sure(self) -> bool:
        """Whether times by them are good."""
        return self.share >= UNSURE

    def to_dict(self) -> dict[str, Any]:
        """As a generation config names them."""
        return {HEADS_KEY: [list(head) for head in self.heads], SHARE_KEY: round(self.share, 4)}


def path_shares(weights: np.ndarray) -> np.ndarray:
    """How much of each head's attention `(H, T, A)` lies on its best path that only goes forward, `(H,)`."""
    near = np.cumsum(np.pad(weights, ((0, 0), (0, 0), (REACH + 1, REACH))), axis=-1)
    near = near[..., 2 * REACH + 1 :] - near[..., : -2 * REACH - 1]  # attention within reach
    total = np.zeros((weights.shape[0], weights.shape[2]))
    for row in range(weights.shape[1]):
        before = np.maximum.accumulate(total, axis=-1)
        step = np.concatenate([np.zeros_like(before[:, :1]), before[:, :-1]], axis=1) if row else before
        total = step + near[:, row]
    return total.max(-1) / weights.shape[1]


def choose_heads(shares: dict[tuple[int, int], float]) -> AlignmentHeads:
    """The best heads: those that come near to the best."""
    ranked = sorted(shares, key=lambda head: -shares[head])[:MAX_HEADS]
    chosen = tuple(head for head in ranked if shares[head] >= NEARLY_BEST * shares[ranked[0]])
    return AlignmentHeads(chosen, sum(shares[head] for head in chosen) / len(chosen))


def known_heads(model: AudioFlamingo3WithHead) -> AlignmentHeads | None:
    """The heads that the checkpoint names, or that were found in the same weights before."""
    text = model.config.text_config
    heads = read_heads(model.generation_config.extra, text)
    if heads is None:
        with contextlib.suppress(AudioFlamingoError, OSError):
            heads = read_heads(read_json(_file(model)), text)
    return heads


def keep_heads(model: AudioFlamingo3WithHead, heads: AlignmentHeads) -> None:
    """Notes heads in the model's generation config, and on disk where that is possible."""
    content = heads.to_dict()
    model.generation_config.extra.update(content)
    with contextlib.suppress(AudioFlamingoError, OSError):  # they will be found again
        file = _file(model)
        make_folder(file.parent)
        write_text(file, to_json(content))


def read_heads(content: Mapping[str, Any], text: Qwen2Config) -> AlignmentHeads | None:
    """Heads as a generation config names them; None if there are none that such a language model has."""
    try:
        heads = tuple((int(layer), int(head)) for layer, head in content[HEADS_KEY])
        share = float(content[SHARE_KEY])
    except (KeyError, TypeError, ValueError):
        return None
    is_there = all(
        0 <= layer < text.num_hidden_layers and 0 <= head < text.num_attention_heads for layer, head in heads
    )
    return AlignmentHeads(heads, share) if heads and is_there else None


def _file(model: AudioFlamingo3WithHead) -> Path:
    """The file in the user's cache for these weights."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256()
    for name, tensor in model.model.language_model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.flatten()[:NUM_VALUES].float().cpu().numpy().tobytes())
    return cache / "audioflamingo" / HEADS_KEY / f"{digest.hexdigest()[:32]}.json"
