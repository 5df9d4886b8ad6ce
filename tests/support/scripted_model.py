"""A stand-in for the network that answers by a script, for tests of what happens around the answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from audioflamingo.audio.loading import num_audio_tokens
from audioflamingo.config import GenerationConfig
from audioflamingo.network.kv import KVView
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.tiny_tokenizer import write_tiny_processor

AUDIO_TOKEN_S = 0.04
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"

Script = Callable[[float, int], str]


def tiny_processor(folder: Path) -> AudioFlamingo3Processor:
    """The processor of the tiny tokenizer."""
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(folder))


def framed(text: str) -> str:
    """A transcript in the sentence that the model was trained to wrap it in."""
    return f'The spoken content of the audio is "{text}".'


class ScriptedModel:
    """Answers a prompt with `script(seconds of audio in it, times that this audio was asked about before)`.

    What it knows of a row are the tokens in the row's slots, each with the attempt beside it: rows that were mixed up
    would show. Every token is as sure as the next: log-probability -0.5. Prompts end with the turn that `opening` is.

    Attributes:
        calls: for each run of the network that read prompts, the seconds of audio in each.
        num_steps: runs of the network.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    compiles_steps = False

    def __init__(
        self, processor: AudioFlamingo3Processor, script: Script, opening: str = "assistant\n"
    ) -> None:
        self._tokenizer = processor.tokenizer
        self._end = processor.tokenizer.control_tokens[END_TOKEN]
        vocab_size = 1 + max(processor.tokenizer.control_tokens.values())
        text_config = SimpleNamespace(
            vocab_size=vocab_size, max_position_embeddings=5000, num_hidden_layers=1
        )
        self.config = SimpleNamespace(text_config=text_config, audio_token_id=processor.audio_token_id)
        self.generation_config = GenerationConfig(eos_token_id=self._end, pad_token_id=0)
        self._script = script
        ids = (processor.tokenizer.control_tokens[START_TOKEN], *processor.tokenizer.encode_plain(opening))
        self._question = [float(i) for i in ids]
        self._asked: Counter[bytes] = Counter()
        self._answers: dict[int, tuple[int, list[int]]] = {}  # by first slot: length of the prompt, ids
        self.calls: list[list[float]] = []
        self.num_steps = 0

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor) -> Any:
        """Two columns: the id of an audio token, and how often its window was asked about before."""
        rows = []
        for window, mask in zip(input_features, input_features_mask, strict=True):
            key = hashlib.blake2b(window.numpy().tobytes()).digest()
            row = [float(self.config.audio_token_id), float(self._asked[key])]
            self._asked[key] += 1
            rows += [row] * num_audio_tokens(int(mask.sum()))
        return SimpleNamespace(pooler_output=torch.tensor(rows))

    def encode_in_pieces(
        self, features: Tensor, num_frames: int, num_positions: int
    ) -> Generator[None, None, Tensor]:
        """The same for one window `(M, T)`, in two pieces."""
        yield
        mask = (torch.arange(features.shape[1]) < num_frames)[None]
        return self.get_audio_features(features[None], mask).pooler_output

    def embed(self, token_ids: Tensor) -> Tensor:
        return torch.stack([token_ids.float(), torch.zeros(len(token_ids))], dim=1)

    def packed_logits(self, x: Tensor, view: KVView, last: Tensor) -> Tensor:
        layout = view.layout
        assert layout.num_new is not None
        self.num_steps += 1
        stored, _ = view.write(0, x[:, None], x[:, None])  # (1, slots, 2)
        rows = list(zip(layout.starts.tolist(), layout.ends.tolist(), strict=True))
        reads = []
        for start, count in rows:
            # A prompt may have come in pieces, or begin as another that is kept: what counts is that it is whole.
            tokens = stored[0, start : start + count]
            if tokens[-len(self._question) :, 0].tolist() == self._question:
                reads.append(self._read(start, tokens))
        if reads:
            self.calls.append(reads)
        places = [row for row, count in zip(rows, layout.num_new, strict=True) for _ in range(count)]
        logits = [self._logits(*places[index]) for index in last.tolist()]
        return torch.stack(logits) if logits else x.new_zeros(0, self.config.text_config.vocab_size)

    def _read(self, start: int, prompt: Tensor) -> float:
        """Decides on the answer to a prompt `(S, 2)`; returns the seconds of its audio."""
        audio = prompt[prompt[:, 0] == self.config.audio_token_id]
        seconds = len(audio) * AUDIO_TOKEN_S
        attempt = int(audio[-1, 1]) if len(audio) else 0
        text = self._script(seconds, attempt)
        self._answers[start] = len(prompt), [*self._tokenizer.encode_plain(text), self._end]
        return seconds

    def _logits(self, start: int, end: int) -> Tensor:
        num_prompt, answer = self._answers.get(start, (end, [self._end]))  # unknown: a run to warm up
        vocab_size = self.config.text_config.vocab_size
        rest = 1 - torch.tensor(-0.5).exp()
        logits = torch.full((vocab_size,), float((rest / (vocab_size - 1)).log()))
        logits[answer[min(end - num_prompt, len(answer) - 1)]] = -0.5
        return logits
