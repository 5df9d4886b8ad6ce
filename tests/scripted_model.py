"""A stand-in for the model that answers by a script, for tests of what happens around the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from audioflamingo.config import GenerationConfig
from audioflamingo.engine.generate import GenerationStep
from audioflamingo.processor import AudioFlamingo3Processor
from tests.tiny_tokenizer import write_tiny_processor

AUDIO_TOKEN_S = 0.04
END_TOKEN = "<|im_end|>"

Script = Callable[[float, dict[str, Any]], str]


def tiny_processor(folder: Path) -> AudioFlamingo3Processor:
    """The processor of the tiny tokenizer."""
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(folder))


def framed(text: str) -> str:
    """A transcript in the sentence that the model was trained to wrap it in."""
    return f'The spoken content of the audio is "{text}".'


class ScriptedModel:
    """Answers each row with `script(seconds of audio in the row, options of the call)`.

    Attributes:
        calls: for each call of `stream`, the seconds of audio in each row.
        num_steps: tokens that were taken from each call.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    generation_config = GenerationConfig()

    def __init__(self, processor: AudioFlamingo3Processor, script: Script) -> None:
        self._processor = processor
        self._script = script
        self.calls: list[list[float]] = []
        self.num_steps: list[int] = []

    def stream(self, input_ids: torch.Tensor, **options: Any) -> Iterator[GenerationStep]:
        """One step a token; the row that is done first waits for the others."""
        is_audio = input_ids == self._processor.audio_token_id
        seconds = (is_audio.sum(dim=1) * AUDIO_TOKEN_S).tolist()
        self.calls.append(seconds)
        self.num_steps.append(0)
        tokenizer = self._processor.tokenizer
        end = tokenizer.control_tokens[END_TOKEN]
        rows = [[*tokenizer.encode_plain(self._script(s, options)), end] for s in seconds]
        return self._steps([row[: options["max_new_tokens"]] for row in rows], end, len(self.calls) - 1)

    def _steps(self, rows: list[list[int]], end: int, call: int) -> Iterator[GenerationStep]:
        for position in range(max(map(len, rows))):
            is_new = [position < len(row) for row in rows]
            ids = torch.tensor([row[position] if new else 0 for row, new in zip(rows, is_new, strict=True)])
            reasons = [
                None if position < len(row) - 1 else ("stop" if row[-1] == end else "length") for row in rows
            ]
            self.num_steps[call] += 1
            yield GenerationStep(ids, is_new, reasons, torch.full((len(rows),), -0.5))
