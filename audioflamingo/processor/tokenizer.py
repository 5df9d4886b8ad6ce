"""The tokenizer of a checkpoint: text to ids and back.

A thin layer over the `tokenizers` library. It tells two kinds of text apart: a rendered prompt, in which
control tokens such as `<|im_end|>` mean what they say, and plain text, in which they are ordinary characters.
Every control token and special id is read from the checkpoint's files. Only byte-level BPE, which is what
Audio Flamingo 3 (Qwen2.5) uses, is accepted; a tokenizer of another kind belongs to another model.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models
from torch import Tensor

from audioflamingo.errors import ArgumentError, CheckpointError, PromptError, refuse_further_keywords
from audioflamingo.files import make_folder, to_json, write_text
from audioflamingo.kernels.host import to_host
from audioflamingo.processor.collate import TOKENIZER_KEYWORDS, BatchFeature
from audioflamingo.processor.folders import read_tokenizer, save_chat_template, token_content

# What Qwen2's tokenizer takes for end, padding and unknown where the checkpoint's configuration does not say.
QWEN2_DEFAULT_TOKEN = "<|endoftext|>"

TokenIds = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor


@dataclass(frozen=True)
class _ControlTokenMatcher:
    """Finds control tokens in text: one group of `pattern` for each token, `ids` in the order of groups."""

    pattern: re.Pattern[str]
    ids: tuple[int, ...]

    @classmethod
    def build(cls, tokens: dict[str, tuple[int, AddedToken]]) -> _ControlTokenMatcher:
        """`tokens` maps what the text holds to id and options. Where several match, the longest one wins."""
        longest_first = sorted(tokens, key=len, reverse=True)
        alternatives = []
        for content in longest_first:
            _, options = tokens[content]
            core = f"({re.escape(content)})"
            if options.single_word:
                core = rf"(?<!\w){core}(?!\w)"
            # A run of spaces is entered at its start only, so that long runs cost linear time.
            before = r"(?:(?<!\s)\s++)?" if options.lstrip else ""
            alternatives.append(before + core + (r"\s*+" if options.rstrip else ""))
        return cls(
            re.compile("|".join(alternatives) or r"(?!)"), tuple(tokens[name][0] for name in longest_first)
        )

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yields text between control tokens as (text, None) and control tokens as (token, id)."""
        end = 0
        for match in self.pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()], None
            group = match.lastindex or 0
            yield match[group], self.ids[group - 1]
            end = match.end()
        if end < len(text):
            yield text[end:], None


class Tokenizer:
    """Text to ids and back, with the control tokens under the caller's command.

    Attributes:
        config: the contents of `tokenizer_config.json`.
        chat_template: the Jinja source that the folder ships, a dict of several named ones, or None.
        special_tokens_map: the named tokens, such as
            `{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}`.
        control_tokens: token to id of everything that is matched as a whole in a prompt (the "added tokens").
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        """Wraps a `tokenizers.Tokenizer`; `from_folder` is the usual way.

        Raises:
            CheckpointError: it is not a byte-level BPE, or adds tokens to every text.
        """
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            found = f"{type(backend.model).__name__} with decoder {type(backend.decoder).__name__}"
            raise CheckpointError(f"Audio Flamingo 3 has a byte-level BPE tokenizer, this one is {found}.")
        self.config = dict(config or {})
        self.chat_template = chat_template
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens_map = self._add_named_tokens()
        if backend.num_special_tokens_to_add(False):
            raise CheckpointError(
                "this tokenizer adds tokens around every text; Audio Flamingo 3's does not."
            )
        added = {options.content: (token_id, options) for token_id, options in self._added().items()}
        self.control_tokens = {content: token_id for content, (token_id, _) in added.items()}
        self._skipped_ids = {token_id for token_id, options in self._added().items() if options.special}
        # A token marked "normalized" is looked for after the text's normalisation, the others before it.
        self._matcher = _ControlTokenMatcher.build({k: v for k, v in added.items() if not v[1].normalized})
        normalized = {self._normalize(k): v for k, v in added.items() if v[1].normalized}
        self._normalized_matcher = _ControlTokenMatcher.build(normalized) if normalized else None
        first = sorted({content[0] for content in (*added, *normalized)})
        self._first_character = re.compile("[" + re.escape("".join(first)) + "]" if first else r"(?!)")
        # The same pipeline without its control tokens: model and steps are shared, not copied.
        self._plain = tokenizers.Tokenizer(backend.model)
        self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the configuration beside it.

        NVIDIA's original checkpoints keep these files in a subfolder `llm`, which is looked into as well.

        Raises:
            CheckpointError: files are absent, damaged, or contradict each other.
        """
        return cls(*read_tokenizer(Path(folder)))

    def save(self, folder: str | Path, chat_template: str | dict[str, str] | None = None) -> None:
        """Writes files that transformers loads too, each whole or not at all.

        Args:
            folder: made if it is not there.
            chat_template: stored in place of the tokenizer's own.
        """
        folder = Path(folder)
        make_folder(folder)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "Qwen2Tokenizer")
        for name, token in self.special_tokens_map.items():
            config.setdefault(name, token)
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", to_json(config))
        save_chat_template(folder, chat_template or self.chat_template)

    def to_json(self) -> str:
        """What `tokenizer.json` holds, the control tokens of the configuration included."""
        return self._backend.to_str()

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {len(self.control_tokens)} of them control tokens)"

    # Control tokens and special ids

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Looks up one token (an int) or several (a list).

        Raises:
            CheckpointError: the vocabulary has no such token.
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._backend.token_to_id(tokens)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {tokens!r}.")
        return token_id

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def pad_token(self) -> str | None:
        """The padding token, None if the checkpoint names none."""
        return self.special_tokens_map.get("pad_token")

    @property
    def eos_token(self) -> str | None:
        """The end token, None if the checkpoint names none."""
        return self.special_tokens_map.get("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, None if the checkpoint names none."""
        return self._special_id("pad_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end token, None if the checkpoint names none."""
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the begin token, None if the checkpoint names none (Qwen2 has none)."""
        return self._special_id("bos_token")

    def _added(self) -> dict[int, AddedToken]:
        return self._backend.get_added_tokens_decoder()

    def _add_named_tokens(self) -> dict[str, str]:
        """Makes every token that the configuration names a special one, as transformers does."""
        named = {
            key: content
            for key, value in self.config.items()
            if key.endswith("_token") and (content := token_content(value)) is not None
        }
        if str(self.config.get("tokenizer_class", "Qwen2")).startswith("Qwen2"):
            for key in ("eos_token", "pad_token", "unk_token"):
                if key not in self.config and self._backend.token_to_id(QWEN2_DEFAULT_TOKEN) is not None:
                    named[key] = QWEN2_DEFAULT_TOKEN
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        wanted = [*named.values(), *filter(None, map(token_content, extra))]
        present = {options.content: options for options in self._added().values()}
        for content in dict.fromkeys(wanted):
            options = present.get(content, AddedToken(content, normalized=False))
            if content not in present or not options.special:
                options.special = True
                self._backend.add_special_tokens([options])
        return named

    # Text to ids

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, **others: Any
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of a text, or lists of both for several, as transformers' tokenizers give.

        Control tokens in a text become their ids; no token is put around it (this tokenizer has none to put there), so
        `add_special_tokens` changes nothing. Padded tensors are the processor's work: `processor(text=...)`. Of
        transformers' further keywords those are taken that ask for what is done anyway.

        Raises:
            ArgumentError: it is neither a text nor a sequence of texts, or a keyword is unknown or asks for tensors.
        """
        refuse_further_keywords(
            "tokenizer", others, TOKENIZER_KEYWORDS, "; processor(text=...) gives padded tensors"
        )
        ids: Any
        if isinstance(text, str):
            ids = self.encode_prompt(text)
            return BatchFeature(input_ids=ids, attention_mask=[1] * len(ids))
        if not isinstance(text, Sequence) or not all(isinstance(one, str) for one in text):
            raise ArgumentError(f"text must be a text or a list of texts, got {text!r:.80}.")
        ids = [self.encode_prompt(one) for one in text]
        return BatchFeature(input_ids=ids, attention_mask=[[1] * len(row) for row in ids])

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Splits a prompt at its control tokens into (text, None) and (token, id)."""
        for piece, token_id in self._matcher.split(text):
            if token_id is None and self._normalized_matcher is not None:
                yield from self._normalized_matcher.split(self._normalize(piece))
            else:
                yield piece, token_id

    def guard(self, text: str, marker: str) -> str:
        """Puts `marker` wherever it keeps a control token from being found in `text`, or across its borders.

        Args:
            text: anything, for instance what a user wrote.
            marker: a character that neither this text nor the text around it holds.

        Returns:
            The text with markers; take them out after `split` has looked for control tokens.
        """
        if self._normalized_matcher is not None:
            text = self._normalize(text)
        text = self._first_character.sub(lambda match: match[0] + marker, text)
        start = len(text) - len(text.lstrip())
        return text[:start] + marker + text[start:] if start < len(text) else text

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes a rendered prompt: control tokens in it become their ids."""
        ids: list[int] = []
        for piece, token_id in self.split(_checked(text)):
            ids.extend(self.encode_plain(piece) if token_id is None else [token_id])
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encodes text in which nothing is a control token."""
        return self.plain_encoding(text).ids

    def plain_encoding(self, text: str) -> tokenizers.Encoding:
        """Like `encode_plain`, with `.ids` and `.offsets`: the characters of `text` that a token covers."""
        return self._plain.encode(_checked(text), add_special_tokens=False)

    def _normalize(self, text: str) -> str:
        return text if self._backend.normalizer is None else self._backend.normalizer.normalize_str(text)

    # Ids to text

    def decode(self, token_ids: TokenIds, skip_special_tokens: bool = False) -> str | list[str]:
        """Turns ids into text; ids that the vocabulary lacks give nothing.

        Args:
            token_ids: one row (an int, a list, a 1-D array or tensor) or a batch (lists of lists, 2-D).
            skip_special_tokens: leave out end, padding and the like.

        Returns:
            The text of the row, or a list with one text a row.

        Raises:
            ArgumentError: the ids are not whole numbers from 0 on, or have more than two axes.
        """
        if isinstance(token_ids, Tensor | np.ndarray) and token_ids.ndim > 2:
            raise ArgumentError(
                f"decode() takes one row or a batch of ids, got shape {tuple(token_ids.shape)}."
            )
        ids = _to_lists(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        is_batch = isinstance(token_ids, Tensor | np.ndarray) and token_ids.ndim == 2
        if is_batch or (ids and all(isinstance(row, list) for row in ids)):
            return [self._decode_row(row, skip_special_tokens) for row in ids]
        return self._decode_row(ids, skip_special_tokens)

    def _decode_row(self, ids: list[int], skip_special_tokens: bool) -> str:
        _check_ids(ids)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """The bytes that one token adds to a decoded text."""
        if skip_special_tokens and token_id in self._skipped_ids:
            return b""
        token = self._backend.id_to_token(token_id) or ""
        table = _byte_level_alphabet()
        try:
            return bytes(table[character] for character in token)
        except KeyError:  # a control token whose name leaves the alphabet of byte-level BPE stands for itself
            return token.encode()


class StreamDecoder:
    """Decodes ids as they arrive, never giving out half a character.

    What `put` and `end` return, joined, equals `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_ids: int | Sequence[int] | np.ndarray | Tensor) -> str:
        """Takes the next id or ids and returns the text that is now certain, possibly none."""
        ids = _to_lists(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        _check_ids(ids)
        return self._characters.decode(
            b"".join(self._tokenizer.token_bytes(token_id, self._skip_special_tokens) for token_id in ids)
        )

    def end(self) -> str:
        """Ends the text and starts anew: what is left of an unfinished character comes out as U+FFFD."""
        rest = self._characters.decode(b"", final=True)
        self._characters.reset()
        return rest


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


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte. Byte-level BPE writes printable bytes as themselves and the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"text must be a string, got a {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"text must be valid Unicode: {error}.") from error
    return text


def _to_lists(token_ids: Any) -> Any:
    """Tensors and arrays, also inside a list, as Python numbers."""
    if isinstance(token_ids, Tensor):
        return to_host(token_ids)
    if isinstance(token_ids, np.ndarray | np.generic):
        return token_ids.tolist()
    return [_to_lists(item) for item in token_ids] if isinstance(token_ids, list | tuple) else token_ids


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**32 for i in ids):
        raise ArgumentError(
            f"token ids must be whole numbers from 0 on, in one row or a batch of rows; got {ids!r:.80}."
        )
