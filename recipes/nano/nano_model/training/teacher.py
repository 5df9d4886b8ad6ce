"""Whisper itself as a teacher: what it expects at each token of a transcript, when it hears the clip as it was made to.

Trained on synthetic speech alone, the built-in model forgets people. Whisper's own decoder, with a few seconds of
silence behind the clip (without them it does not know where the transcript ends), gives the likeliest tokens at each
place of a transcript; training mixes them into the labels. They are computed once a clip and kept on disk.
"""

from __future__ import annotations

import json
import random
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from audioflamingo.audio.loading import N_SAMPLES, SAMPLING_RATE, load_audio
from audioflamingo.audio.stored import path_of
from audioflamingo.datasets.conversations import DataRow, text_of
from audioflamingo.errors import AudioError
from audioflamingo.files import replacing

from ..assemble import SPECIAL, Tokens, openings, whisper_rows
from ..layout import STATE
from ..vocabulary import ANSWER, CLOSE, QUOTE, QUOTED
from ..whisper import NO_TIMESTAMPS, START, Whisper

SILENCE_S = 3.0  # behind a clip
TOP = 16  # tokens that are kept at each place
LEAST_KNOWN = 0.5  # of what the teacher expects, where the built-in model has tokens for it
SHARE = 0.7  # of the teacher in a label; the rest is the transcript's own token
CLIPS_OF_A_SHARD = 250


@dataclass(frozen=True)
class Soft:
    """What a teacher expects at M labels.

    Attributes:
        tokens, shares: (M, TOP); the shares of a place sum up to 1.
        is_taught: (M,), where there is anything.
    """

    tokens: Tensor
    shares: Tensor
    is_taught: Tensor


def quoted_words(row: DataRow) -> str | None:
    """The words that a row ends with, in quotes and behind whatever opening; None if it ends otherwise."""
    _, quote, words = text_of(row.messages[-1]).partition(QUOTED)
    return words[: -len(CLOSE)] or None if quote and words.endswith(CLOSE) else None


def transcript_of(row: DataRow) -> str | None:
    """The words that a row about a single clip ends with."""
    return quoted_words(row) if len(row.audio) == 1 else None


class Teacher:
    """Whisper's decoder on the tokens of the built-in model.

    Args:
        whisper: the decoder.
        rows: Whisper's number of each ordinary token, from `assemble.whisper_rows`.
        tokenizer: of the built-in model (tokenizers.Tokenizer).
    """

    def __init__(self, whisper: Whisper, rows: Sequence[int], tokenizer: Any) -> None:
        self.whisper, self.rows, self.tokenizer = whisper, torch.tensor(list(rows)), tokenizer
        tokens = Tokens(tokenizer)
        self.never = torch.zeros(2, len(rows))  # behind the quote; elsewhere
        spaced = [n for n, name in enumerate(tokens.names[: len(rows)]) if name.startswith("Ġ")]
        self.never[0, spaced] = self.never[1, openings(tokens.names)] = -torch.inf
        digits = [n for n, name in enumerate(tokens.names[: len(rows)]) if re.search(r"\d", name)]
        self.never[:, [tokens.quote, tokens.assistant, *digits]] = -torch.inf  # the transcripts have words

    @classmethod
    def of(cls, whisper: Whisper, tokenizer_file: Path) -> Teacher:
        """For the tokens of a tokenizer.json: the ordinary ones are Whisper's, by name."""
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokens = Tokens(tokenizer)
        numbers: dict[str, int] = whisper.tokenizer["model"]["vocab"]
        ordinary = tokens.names[: len(tokens.names) - len(SPECIAL)]
        kept = [numbers.get(name, -1) for name in ordinary]  # `assistant` is not Whisper's
        return cls(whisper, whisper_rows(kept, tokens, numbers), tokenizer)

    def ids(self, transcript: str) -> list[int]:
        """The transcript's tokens, as they stand behind the quote."""
        ids: list[int] = self.tokenizer.encode(f"{ANSWER}{transcript}{CLOSE}").ids
        names = [self.tokenizer.id_to_token(number) for number in ids]
        return ids[names.index(QUOTE) + 1 : len(names) - 1 - names[::-1].index(CLOSE)]

    @torch.inference_mode()
    def expects(self, transcript: str, frames: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens at each of the transcript's T tokens and their shares, (T, TOP).

        The shares are nought where most of what Whisper expects has no token here: a digit, where the transcript has
        "two", leaves "too" as the likeliest of the rest.

        Args:
            transcript: its text.
            frames: the encoder's rows, silence included (A, STATE).
        """
        ids = self.ids(transcript)
        heard = torch.tensor([START, NO_TIMESTAMPS, *self.rows[ids].tolist()])
        state = self.whisper.states(heard, frames)[-1][1:-1]
        all_logits = F.layer_norm(state, (STATE,), *self.whisper.norm, 1e-5) @ self.whisper.output.T
        logits = all_logits[:, self.rows] + self.never[[0] + [1] * (len(ids) - 1)]
        values, tokens = logits.topk(TOP)
        known = (values.logsumexp(-1) - all_logits.logsumexp(-1)).exp()
        shares = values.softmax(-1) * (known > LEAST_KNOWN)[:, None]
        return tokens.numpy().astype(np.int32), shares.numpy().astype(np.float16)


class Lessons:
    """Expectations on disk, by recording and transcript."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._shards: set[str] = set()

    def reload(self) -> None:
        """Reads shards that are new."""
        for file in sorted(self.folder.glob("lessons-*.npz")):
            if file.name not in self._shards:
                self._shards.add(file.name)
                with np.load(file) as shard:
                    ends = np.cumsum(shard["lengths"])[:-1]
                    parts = zip(*(np.split(shard[name], ends) for name in ("tokens", "shares")), strict=True)
                    self._known |= dict(zip(json.loads(str(shard["keys"])), parts, strict=True))

    def get(self, row: DataRow) -> tuple[np.ndarray, np.ndarray] | None:
        """What is expected in the last transcript of a row."""
        transcript = transcript_of(row)
        return None if transcript is None else self._known.get(_key(row, transcript))

    def make(self, rows: Iterable[DataRow], teacher: Teacher, model: Any, processor: Any) -> int:
        """Computes what is missing, but for clips that cannot be read; stopping it loses a shard at most.

        Returns:
            The number of lessons that were missing.
        """
        self.reload()
        wanted = {}
        for row in rows:
            transcript = transcript_of(row)
            if transcript is not None and _key(row, transcript) not in self._known:
                wanted[_key(row, transcript)] = (row, transcript)
        jobs = list(wanted.items())
        random.Random(0).shuffle(jobs)
        start = time.perf_counter()
        for first in range(0, len(jobs), CLIPS_OF_A_SHARD):
            part = jobs[first : first + CLIPS_OF_A_SHARD]
            made = {}
            for key, (row, transcript) in part:
                try:
                    made[key] = teacher.expects(transcript, padded_rows(row, model, processor))
                except AudioError as error:
                    print(f"not taught: {error}", flush=True)
            if made:
                self._write(made)
            done = first + len(part)
            print(f"lessons: {done} of {len(jobs)}, {time.perf_counter() - start:.0f} s", flush=True)
        return len(jobs)

    def _write(self, made: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"lessons-{uuid.uuid4().hex[:16]}.npz"
        with replacing(self.folder / name) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                keys=json.dumps(list(made)),
                lengths=[len(tokens) for tokens, _ in made.values()],
                tokens=np.concatenate([tokens for tokens, _ in made.values()]),
                shares=np.concatenate([shares for _, shares in made.values()]),
            )
        self._known |= made
        self._shards.add(name)

    def soft(self, rows: Sequence[DataRow | None], quote: int, labels: Tensor, label_rows: Tensor) -> Soft:
        """For the labels of a batch, but for the last token of a transcript: behind a single word Whisper expects it
        once more as often as a full stop, and the words would never end.

        Args:
            rows: of the batch; None where nothing is to be taught.
            quote: number of the opening quote.
            labels: those that count, row by row (M,).
            label_rows: the row of each (M,).
        """
        soft = Soft(
            torch.zeros(len(labels), TOP, dtype=torch.long),
            torch.zeros(len(labels), TOP),
            torch.zeros(len(labels), dtype=torch.bool),
        )
        for number, row in enumerate(rows):
            known = None if row is None else self.get(row)
            quotes = ((label_rows == number) & (labels == quote)).nonzero()[:, 0]
            if known is None or not len(quotes):
                continue
            first, taught = int(quotes[-1]) + 1, len(known[0]) - 1
            part = slice(first, first + taught)
            soft.tokens[part] = torch.from_numpy(known[0][:taught].astype(np.int64))
            soft.shares[part] = torch.from_numpy(known[1][:taught].astype(np.float32))
            soft.is_taught[part] = soft.shares[part].sum(1) > LEAST_KNOWN
        return soft


def padded_rows(row: DataRow, model: Any, processor: Any) -> Tensor:
    """The encoder's rows of a row's clip with silence behind it."""
    waveform = load_audio(row.audio[0])
    silence = max(0, min(int(SILENCE_S * SAMPLING_RATE), N_SAMPLES - len(waveform)))
    inputs = processor.apply_transcription_request(audio=np.pad(waveform, (0, silence)))
    mask = inputs.input_features_mask
    frames = int(mask.sum())
    with torch.inference_mode():
        return model.model.audio_tower(inputs.input_features[..., :frames], mask[:, :frames]).audio_tokens


def _key(row: DataRow, transcript: str) -> str:
    path = Path(path_of(row.audio[0]))
    return f"{'/'.join(path.parts[-4:])}|{transcript}"
