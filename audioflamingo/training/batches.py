"""Rows -> the tensors of a batch: labels on the assistant's text only, padding on the right.

Each row's text is encoded once; its audio is then put in, or with cached encoder outputs only the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from audioflamingo.audio.loading import N_FRAMES, conv_length, load_audio
from audioflamingo.config import IGNORED_LABEL
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.network.encoder import POOL
from audioflamingo.processor import AudioFlamingo3Processor, BatchFeature, Prompt, PromptText, collate
from audioflamingo.processor.clips import Clip
from audioflamingo.processor.options import TextOptions
from audioflamingo.training.augmentation import augment_waveform, mask_features, mask_rows
from audioflamingo.training.batch_sampler import AUDIO_TOKENS_PER_S
from audioflamingo.training.config import CTC_ALPHABET, AugmentationConfig
from audioflamingo.training.feature_cache import FeatureCache

POSITIONS_PER_WINDOW = conv_length(N_FRAMES)

Batch = dict[str, Any]


class BatchEncoder:
    """Turns rows into batches.

    A batch holds `input_ids`, `attention_mask`, `labels` (B, S); `input_features` and `input_features_mask`, or
    `audio_rows` from the cache: (A, D_audio) or, if later layers of the encoder are trained, (P, D_audio) with
    `audio_layers`, the number of layers behind them; beside them `audio_windows`, the rows of each window and its
    number in its clip; for CTC `ctc_spans` (K, 2), start and number of each clip's audio rows, `ctc_targets` and
    `ctc_lengths`; `answer_weights` (B,), `num_labels` (by weight), `num_characters`, `num_rows`, `audio_s`; and `ids`.

    Args:
        processor: of the model.
        augmentation: what is drawn for training batches.
        cache: encoder outputs; None encodes audio in the model.
        uses_ctc: prepare CTC targets.
        uses_answers: prepare ids and labels; without them only the CTC part is there.
    """

    def __init__(
        self,
        processor: AudioFlamingo3Processor,
        augmentation: AugmentationConfig | None = None,
        cache: FeatureCache | None = None,
        uses_ctc: bool = False,
        uses_answers: bool = True,
    ) -> None:
        self.processor = processor
        self.augmentation = augmentation
        self.cache = cache
        self.uses_ctc = uses_ctc
        self.uses_answers = uses_answers
        self._texts: dict[str, PromptText] = {}

    def __call__(self, rows: Sequence[DataRow], seed: Sequence[int] | None = None) -> Batch:
        """Builds a batch.

        Args:
            rows: at least one.
            seed: numbers that all chance of this batch comes from; None prepares the rows as they are.

        Raises:
            AudioError: a clip that cannot be read.
            PromptError: a conversation that the chat template refuses.
        """
        rngs = [None if seed is None else np.random.default_rng([*seed, i]) for i in range(len(rows))]
        batch: Batch = {"ids": [row.id for row in rows], "num_rows": len(rows)}
        batch["audio_s"] = sum(row.duration_s for row in rows)
        counts = self._add_cached(batch, rows, rngs) if self.cache else self._add_processed(batch, rows, rngs)
        if "labels" in batch:
            batch["answer_weights"] = torch.tensor([row.answer_weight for row in rows])
            num_labels = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1)
            batch["num_labels"] = float((num_labels * batch["answer_weights"]).sum())
        if self.uses_ctc:
            _add_ctc(batch, rows, counts)
        return batch

    def _add_processed(
        self, batch: Batch, rows: Sequence[DataRow], rngs: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """Prompts with their audio. Returns the audio tokens of each row."""
        prompts = [self._prompt(row, rng) for row, rng in zip(rows, rngs, strict=True)]
        batch.update(self._collate(prompts))
        spec = self.augmentation.spec if self.augmentation is not None else None
        if spec is not None and (spec.time_masks or spec.mel_masks):
            start = 0
            for prompt, rng in zip(prompts, rngs, strict=True):
                end = start + len(prompt.windows)
                if rng is not None and prompt.windows:
                    lengths = [window.num_frames for window in prompt.windows]
                    mask_features(batch["input_features"][start:end], lengths, spec, rng)
                start = end
        return [prompt.num_audio_tokens for prompt in prompts]

    def _prompt(self, row: DataRow, rng: np.random.Generator | None) -> Prompt:
        clips = []
        for path in row.audio:
            waveform = load_audio(path)
            if rng is not None and self.augmentation is not None:
                waveform = augment_waveform(waveform, self.augmentation, rng)
            clips.append(Clip(waveform, name=repr(path)))
        return self.processor.add_audio(self._text(row), clips)

    def _add_cached(
        self, batch: Batch, rows: Sequence[DataRow], rngs: Sequence[np.random.Generator | None]
    ) -> list[int]:
        """Text and cached encoder outputs. Returns the audio tokens of each row."""
        assert self.cache is not None
        num_layers = self.cache.num_layers
        rows_per_s = AUDIO_TOKENS_PER_S if num_layers is None else POOL * AUDIO_TOKENS_PER_S
        features: list[np.ndarray] = []
        lengths: list[int] = []
        numbers: list[int] = []  # which window of its clip each one is
        counts: list[list[int]] = []  # audio tokens of each row's clips
        for row, rng in zip(rows, rngs, strict=True):
            counts.append([])
            for path in row.audio:
                audio_rows = self.cache.get(path, self.cache.draw_variant(rng))
                if rng is not None and self.augmentation is not None and self.augmentation.spec.time_masks:
                    audio_rows = mask_rows(audio_rows, self.augmentation.spec, rng, rows_per_s)
                features.append(audio_rows)
                windows = _window_lengths(
                    len(audio_rows), POSITIONS_PER_WINDOW // (POOL if num_layers is None else 1)
                )
                lengths += windows
                numbers += range(len(windows))
                counts[-1].append(
                    len(audio_rows) if num_layers is None else sum(length // POOL for length in windows)
                )
        if features:
            batch["audio_rows"] = torch.from_numpy(np.concatenate(features))  # (A or P, D_audio) float16
            batch["audio_windows"] = (lengths, numbers)
            if num_layers is not None:
                batch["audio_layers"] = num_layers
        if self.uses_answers:
            texts = map(self._text, rows)
            batch.update(self._collate([text.expand(num) for text, num in zip(texts, counts, strict=True)]))
        return list(map(sum, counts))

    def _collate(self, prompts: Sequence[Prompt]) -> BatchFeature:
        return collate(prompts, self.processor.tokenizer.pad_token_id, TextOptions(padding_side="right"))

    def _text(self, row: DataRow) -> PromptText:
        """The row's text and labels. Kept: rendering takes longer than all the rest."""
        if row.place not in self._texts:
            self._texts[row.place] = self.processor.training_text(row.messages)
        return self._texts[row.place]


def _window_lengths(num_rows: int, num_full: int) -> list[int]:
    """Rows of each window of a clip: only the last one is not full."""
    whole, rest = divmod(num_rows, num_full)
    return [num_full] * whole + ([rest] if rest else [])


def ctc_targets(text: str) -> list[int]:
    """Character numbers of a transcript, 1 for the first letter of the alphabet; others are left out."""
    known = "".join(
        character for character in text.lower() if character in CTC_ALPHABET or character.isspace()
    )
    return [CTC_ALPHABET.index(character) + 1 for character in " ".join(known.split())]


def _add_ctc(batch: Batch, rows: Sequence[DataRow], counts: Sequence[int]) -> None:
    """CTC targets of the transcription rows: spans into the audio rows, characters and their number."""
    spans, targets, lengths = [], [], []
    start = 0
    for row, count in zip(rows, counts, strict=True):
        transcript = row.transcript
        if transcript is not None and (characters := ctc_targets(transcript)) and count > 0:
            spans.append((start, count))
            targets += characters
            lengths.append(len(characters))
        start += count
    batch["num_characters"] = sum(lengths)
    if spans:
        batch["ctc_spans"] = torch.tensor(spans)
        batch["ctc_targets"] = torch.tensor(targets)
        batch["ctc_lengths"] = torch.tensor(lengths)
