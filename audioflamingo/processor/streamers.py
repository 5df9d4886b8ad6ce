"""A streamer that prints an answer while `generate` runs. Other uses of the text: `model.stream`."""

from __future__ import annotations

import sys
from typing import TextIO

from torch import Tensor

from audioflamingo.errors import ArgumentError
from audioflamingo.kernels.host import to_host
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer


class TextStreamer:
    """Prints one prompt and its answer as the tokens come, never half a character.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: print the answer only.
        skip_special_tokens: leave control tokens out of the text.
        file: where to print, standard output by default.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        skip_special_tokens: bool = False,
        file: TextIO | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_prompt = skip_prompt
        self._skip_special_tokens = skip_special_tokens
        self._file = file
        self._decoder: StreamDecoder | None = None

    def put(self, value: Tensor) -> None:
        """Prints the text of the prompt `(1, S)`, then of each new token `(1,)`.

        Raises:
            ArgumentError: more than one row.
        """
        if value.shape[0] != 1:
            raise ArgumentError(
                f"TextStreamer prints one answer, got {value.shape[0]} rows; iterate over model.stream."
            )
        is_prompt = self._decoder is None
        if self._decoder is None:
            self._decoder = StreamDecoder(self._tokenizer, skip_special_tokens=self._skip_special_tokens)
        if not (is_prompt and self._skip_prompt):
            self._print(self._decoder.put(to_host(value.flatten())))

    def end(self) -> None:
        """Prints what is left and a line end."""
        rest = "" if self._decoder is None else self._decoder.end()
        self._decoder = None
        self._print(rest + "\n")

    def _print(self, text: str) -> None:
        print(text, end="", flush=True, file=self._file or sys.stdout)
