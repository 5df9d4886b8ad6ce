"""Models for tests of generation: a tiny random one whose answers vary, and one that follows a script."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from audioflamingo.audio.loading import num_audio_tokens
from audioflamingo.config import GenerationConfig
from audioflamingo.engine.generate import generate, stream
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.network.kv import KVCache, KVView
from tests.support.tiny_model import AUDIO_TOKEN_ID, tiny_model, tiny_reference

END = 497  # what `stopping_model` ends its answers with
MANY_EOS = list(range(20, 90))  # so many end-of-sequence ids that a row ends every few tokens


def lively_model(
    seed: int = 0, sharpness: float = 3.0, **text_changes: Any
) -> AudioFlamingo3ForConditionalGeneration:
    """The tiny model, changed so that each token depends on the last ones; as it is, it repeats one token."""
    model = tiny_model(seed, **text_changes)
    enliven(model, sharpness)
    return model


def stopping_model() -> AudioFlamingo3ForConditionalGeneration:
    """The lively model, which ends its answers with the token `END`."""
    model = lively_model()
    model.generation_config.eos_token_id = END
    return model


def lively_reference(seed: int = 0, sharpness: float = 3.0) -> Any:
    """transformers' model with the weights of `lively_model(seed, sharpness)`."""
    reference = tiny_reference(seed)
    enliven(reference, sharpness)
    return reference


@torch.no_grad()
def enliven(model: Any, sharpness: float = 3.0) -> None:
    """Lets each token depend on the last ones."""
    model.model.language_model.embed_tokens.weight.mul_(20)
    model.lm_head.weight.mul_(sharpness)
    model.lm_head.weight[AUDIO_TOKEN_ID] = 0


class ScriptedModel:
    """A model that knows nothing but a function from the tokens of a row to the logits of the next.

    The tokens themselves are what its `KVCache` holds, so rows that were mixed up in the cache show.

    Attributes:
        num_rows: rows of each call, the prefill first.
        num_features: whether each call got audio.
    """

    def __init__(
        self, script: Callable[[list[int]], Tensor], vocab_size: int = 32, context: int = 5000
    ) -> None:
        self.compiles_steps = False
        self.config = SimpleNamespace(
            text_config=SimpleNamespace(
                vocab_size=vocab_size, max_position_embeddings=context, num_hidden_layers=1
            ),
            audio_token_id=AUDIO_TOKEN_ID,
        )
        self.generation_config = GenerationConfig()
        self.device = torch.device("cpu")
        self.num_rows: list[int] = []
        self.num_windows: list[int] = []
        self._script = script

    generate = generate
    stream = stream

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        return KVCache(1, batch_size, max_length or self.config.text_config.max_position_embeddings)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor) -> Any:
        self.num_windows.append(len(input_features))
        count = sum(num_audio_tokens(frames) for frames in input_features_mask.sum(1).tolist())
        return SimpleNamespace(pooler_output=torch.full((count, 1), float(AUDIO_TOKEN_ID)).double())

    def embed(self, token_ids: Tensor) -> Tensor:
        return token_ids.double()[:, None]

    def packed_logits(self, x: Tensor, view: KVView, last: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        layout = view.layout
        self.num_rows.append(len(layout.starts))
        tokens, _ = view.write(0, x[:, :, None], x[:, :, None])  # (1, slots, 1)
        starts, ends = layout.starts.tolist(), layout.ends.tolist()
        rows = [tokens[0, a : a + n, 0].long().tolist() for a, n in zip(starts, ends, strict=True)]
        places = [place for place, count in enumerate(layout.num_new or ()) for _ in range(count)]
        return torch.stack([self._script(rows[places[index]]) for index in last.tolist()]).float()


def random_script(vocab_size: int = 32) -> Callable[[list[int]], Tensor]:
    """Logits that are a fixed random function of all the tokens of the row."""

    def script(tokens: list[int]) -> Tensor:
        seed = int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=4).digest(), "big")
        return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3

    return script


def says(*answers: list[int], vocab_size: int = 32) -> Callable[[list[int]], Tensor]:
    """A script that gives row r of the prompts, which is the one that starts with token r, the r-th answer.

    The prompts are one token long; behind its answer a row repeats its last token.
    """

    def script(tokens: list[int]) -> Tensor:
        answer, place = answers[tokens[0]], len(tokens) - 1
        return (
            torch.nn.functional.one_hot(torch.tensor(answer[min(place, len(answer) - 1)]), vocab_size) * 10.0
        )

    return script


class PieceTokenizer:
    """Decodes id i to the i-th piece of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        assert not skip_special_tokens
        return "".join(self.pieces[token_id] for token_id in token_ids)
